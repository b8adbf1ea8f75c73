"""
TLS for both ends: files become contexts, and what goes wrong becomes a sentence.

Both ends show a certificate. Versions and ciphers are Python's defaults, which
means TLS 1.2 at the least. Standard library only; reads no settings.
"""

from __future__ import annotations

import ssl
from typing import Final

_IN_PEM: Final = "in PEM form"


class TLSFilesError(ValueError):
    """A certificate, a key or a CA file cannot be used; the sentence names it."""


def server_context(certificate: str, key: str, ca: str | None) -> ssl.SSLContext:
    """
    What the job server's port speaks.

    Args:
        certificate: File with the server's certificate, and those between it and its CA.
        key: File with its private key.
        ca: File with the CAs that sign clients' certificates; None to ask clients for none.
    Raises:
        TLSFilesError: A file is missing or wrong, or no client could accept the certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    # Connections last; nobody resumes one.
    context.num_tickets = 0
    _load_certificate(context, certificate, key)
    if ca is not None:
        _load_ca(context, ca)
        context.verify_mode = ssl.CERT_REQUIRED
    _check_that_clients_could_accept(context, certificate)
    return context


def client_context(ca: str, certificate: str | None = None, key: str | None = None) -> ssl.SSLContext:
    """
    What clients and workers speak.

    Args:
        ca: File with the CAs that sign servers' certificates; no other is trusted.
        certificate: File with the certificate to show; None to show none.
        key: File with its private key.
    Raises:
        TLSFilesError: A file is missing or wrong.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and host name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    _load_ca(context, ca)
    if certificate is not None and key is not None:
        _load_certificate(context, certificate, key)
    return context


def _load_certificate(context: ssl.SSLContext, certificate: str, key: str) -> None:
    _see(certificate, "certificate")
    _see(key, "key")

    def refuse() -> str:
        # OpenSSL would ask on the terminal and wait.
        raise TLSFilesError(
            f"the TLS key {key} has a pass phrase; use one without, that only its user can read"
        )

    try:
        context.load_cert_chain(certificate, key, password=refuse)
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror
        if reason == "KEY_VALUES_MISMATCH":
            problem = f"the TLS key {key} does not belong to the certificate {certificate}"
        else:
            problem = f"{certificate} and {key} are no certificate and its key {_IN_PEM} ({reason})"
        raise TLSFilesError(problem) from error


def _load_ca(context: ssl.SSLContext, ca: str) -> None:
    _see(ca, "CA file")
    try:
        context.load_verify_locations(cafile=ca)
    except OSError as error:
        raise TLSFilesError(f"the TLS CA file {ca} holds no certificates {_IN_PEM}") from error
    if not context.cert_store_stats()["x509_ca"]:
        raise TLSFilesError(f"the TLS CA file {ca} holds no certificate of a CA, that may sign others")


def _see(file: str, what: str) -> None:
    # OpenSSL's errors do not say which file.
    try:
        with open(file, "rb"):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TLSFilesError(f"the TLS {what} {file!r} cannot be read: {reason}") from error


def _check_that_clients_could_accept(context: ssl.SSLContext, certificate: str) -> None:
    """
    Shake hands in memory with a client that trusts just this certificate.

    Finds one that has expired, or is not for servers, before clients do.
    """
    probe = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    probe.check_hostname = False
    probe.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    probe.load_verify_locations(cafile=certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = probe.wrap_bio(to_client, to_server)
    server = context.wrap_bio(to_server, to_client, server_side=True)
    try:
        for end in (client, server, client):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
    except ssl.SSLCertVerificationError as error:
        raise TLSFilesError(
            f"no client would accept the TLS certificate {certificate}: {error.verify_message}"
        ) from error
    except ssl.SSLError as error:
        raise TLSFilesError(f"the TLS certificate {certificate} does not work: {error.reason}") from error


def explain(error: OSError, host: str) -> tuple[str, str]:
    """
    Why a client's handshake with a server failed, and a question that leads on.

    Args:
        host: The name by which the server was called.
    """
    if isinstance(error, ssl.SSLCertVerificationError):
        # ssl has no names for OpenSSL's X509_V_ERR_HOSTNAME_MISMATCH and _IP_ADDRESS_MISMATCH.
        if error.verify_code in (62, 64):
            return (
                f"its TLS certificate is not for {host}",
                "is SERVERS spelled as in the certificate's subjectAltName?",
            )
        return (
            f"its TLS certificate is not trusted: {error.verify_message}",
            "did the CA in TLS_CA sign it, and is it in date?",
        )
    reason = getattr(error, "reason", None) or ""
    if "ALERT" in reason and ("CERTIFICATE" in reason or "_CA" in reason or "HANDSHAKE_FAILURE" in reason):
        return f"it does not take our TLS certificate ({reason})", CERTIFICATE_HINT
    if isinstance(error, TimeoutError):
        return "no answer to the TLS handshake in time", "does it speak TLS, and is CONNECT_TIMEOUT enough?"
    if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return f"it does not speak TLS ({reason})", SPEAKS_PLAIN_HINT
    return "it closed the connection during the TLS handshake", CERTIFICATE_HINT


CERTIFICATE_HINT: Final = (
    "does it speak TLS, and did its CA sign the certificate in TLS_CERTIFICATE, if it wants one?"
)
SPEAKS_PLAIN_HINT: Final = "was it started with a certificate (--tls-certificate)?"
