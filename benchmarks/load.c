/* Load for a Gearman job server: clients and workers on one thread, with as little work per packet as C allows.

   load PORT FUNCTION foreground CLIENTS WORKERS SECONDS   each client has one job under way
   load PORT FUNCTION submit CONNECTIONS JOBS              background jobs, pipelined
   load PORT FUNCTION drain WORKERS JOBS                   waiting jobs, run by workers
   load PORT FUNCTION idle CONNECTIONS                     sleeping workers, until standard input ends

   Prints one line: seconds, jobs, median and 99th percentile of a job's round trip in
   microseconds, and the seconds of CPU that this program used meanwhile. */

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    CAN_DO = 1, PRE_SLEEP = 4, NOOP = 6, SUBMIT_JOB = 7, JOB_CREATED = 8, GRAB_JOB = 9, NO_JOB = 10,
    JOB_ASSIGN = 11, WORK_COMPLETE = 13, ECHO_REQ = 16, ECHO_RES = 17, SUBMIT_JOB_BG = 18, ERROR = 19
};
enum { HEADER = 12, ROOM = 1 << 16, PAYLOAD = 100, MAX_SAMPLES = 1 << 22, PATIENCE_MS = 120000 };

struct peer {
    int fd;
    int is_worker;
    double submitted;
    size_t have;
    unsigned char in[ROOM];
};

static int port;
static const char *function;
static unsigned char payload[PAYLOAD];
static long jobs_done;
static float *samples; /* microseconds */

static void die(const char *what)
{
    fprintf(stderr, "load: %s: %s\n", what, errno ? strerror(errno) : "not as expected");
    exit(1);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static double cpu(void)
{
    struct rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec + (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1e-6;
}

static size_t put(unsigned char *at, uint32_t type, const void *body, uint32_t size)
{
    uint32_t words[2] = {htonl(type), htonl(size)};
    memcpy(at, "\0REQ", 4);
    memcpy(at + 4, words, 8);
    if (size)
        memcpy(at + HEADER, body, size);
    return HEADER + size;
}

static size_t put_submission(unsigned char *at, uint32_t type, const char *unique)
{
    unsigned char body[1024];
    size_t size = strlen(function) + 1;
    memcpy(body, function, size);
    memcpy(body + size, unique, strlen(unique) + 1);
    size += strlen(unique) + 1;
    memcpy(body + size, payload, PAYLOAD);
    return put(at, type, body, size + PAYLOAD);
}

static void transmit(struct peer *peer, const unsigned char *data, size_t size)
{
    while (size) {
        ssize_t sent = send(peer->fd, data, size, MSG_NOSIGNAL);
        if (sent < 0)
            die("send");
        data += sent;
        size -= sent;
    }
}

static void submit(struct peer *peer)
{
    unsigned char packet[2048];
    size_t size = put_submission(packet, SUBMIT_JOB, "");
    peer->submitted = now();
    transmit(peer, packet, size);
}

static void send_bare(struct peer *peer, uint32_t type)
{
    unsigned char packet[HEADER];
    transmit(peer, packet, put(packet, type, NULL, 0));
}

static struct peer *open_peers(int count)
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    struct peer *peers = calloc(count, sizeof *peers);
    int one = 1;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (!peers)
        die("memory");
    for (int i = 0; i < count; i++) {
        peers[i].fd = socket(AF_INET, SOCK_STREAM, 0);
        if (peers[i].fd < 0 || connect(peers[i].fd, (struct sockaddr *)&address, sizeof address))
            die("connect");
        setsockopt(peers[i].fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    }
    return peers;
}

/* Offer the function, and take the next step: grab a job, or go to sleep. */
static void start_worker(struct peer *peer, uint32_t step)
{
    unsigned char packet[1024];
    size_t size = put(packet, CAN_DO, function, strlen(function));
    peer->is_worker = 1;
    size += put(packet + size, step, NULL, 0);
    transmit(peer, packet, size);
}

/* What a packet makes its peer do. */
static void handle(struct peer *peer, uint32_t type, const unsigned char *body, uint32_t size)
{
    unsigned char packet[2048];
    size_t length, written;
    switch (type) {
    case JOB_ASSIGN: /* answer with the workload, and grab at once */
        length = strlen((const char *)body) + 1;
        put(packet, WORK_COMPLETE, NULL, 0);
        memcpy(packet + HEADER, body, length);
        memcpy(packet + HEADER + length, body + size - PAYLOAD, PAYLOAD);
        size = htonl(length + PAYLOAD);
        memcpy(packet + 8, &size, sizeof size);
        written = HEADER + length + PAYLOAD;
        written += put(packet + written, GRAB_JOB, NULL, 0);
        transmit(peer, packet, written);
        if (!samples)
            jobs_done++;
        break;
    case NO_JOB:
        send_bare(peer, PRE_SLEEP);
        break;
    case NOOP:
        send_bare(peer, GRAB_JOB);
        break;
    case WORK_COMPLETE:
        if (jobs_done < MAX_SAMPLES)
            samples[jobs_done] = (now() - peer->submitted) * 1e6;
        jobs_done++;
        submit(peer);
        break;
    case JOB_CREATED:
        if (!samples)
            jobs_done++;
        break;
    case ECHO_RES:
        jobs_done++;
        break;
    default:
        errno = 0;
        die("an answer of the server");
    }
}

static void receive(struct peer *peer)
{
    ssize_t got = recv(peer->fd, peer->in + peer->have, ROOM - peer->have, MSG_DONTWAIT);
    size_t at = 0;
    if (got == 0 || (got < 0 && errno != EAGAIN))
        die("receive");
    if (got < 0)
        return;
    peer->have += got;
    while (peer->have - at >= HEADER) {
        uint32_t words[2];
        memcpy(words, peer->in + at + 4, 8);
        if (peer->have - at < HEADER + ntohl(words[1]))
            break;
        handle(peer, ntohl(words[0]), peer->in + at + HEADER, ntohl(words[1]));
        at += HEADER + ntohl(words[1]);
    }
    peer->have -= at;
    memmove(peer->in, peer->in + at, peer->have);
}

/* Serve the peers until so many jobs are done, or until then. */
static void serve(struct peer *peers, int count, long jobs, double until)
{
    struct pollfd *polls = calloc(count, sizeof *polls);
    for (int i = 0; i < count; i++)
        polls[i] = (struct pollfd){.fd = peers[i].fd, .events = POLLIN};
    while (jobs_done < jobs && now() < until) {
        if (poll(polls, count, PATIENCE_MS) <= 0)
            die("the server stopped answering");
        for (int i = 0; i < count; i++)
            if (polls[i].revents)
                receive(&peers[i]);
    }
    free(polls);
}

/* Send everything while the answers are counted. */
static void flood(struct peer *peers, int count, long each)
{
    struct pollfd *polls = calloc(count, sizeof *polls);
    unsigned char **data = calloc(count, sizeof *data);
    size_t *left = calloc(count, sizeof *left);
    for (int i = 0; i < count; i++) {
        unsigned char *at = data[i] = malloc(each * (HEADER + strlen(function) + 32 + PAYLOAD));
        for (long n = 0; n < each; n++) {
            char unique[24];
            snprintf(unique, sizeof unique, "%ld", i * each + n);
            at += put_submission(at, SUBMIT_JOB_BG, unique);
        }
        left[i] = at - data[i];
        polls[i] = (struct pollfd){.fd = peers[i].fd, .events = POLLIN | POLLOUT};
    }
    while (jobs_done < each * count) {
        if (poll(polls, count, PATIENCE_MS) <= 0)
            die("the server stopped answering");
        for (int i = 0; i < count; i++) {
            if (polls[i].revents & POLLOUT) {
                size_t most = left[i] < 1 << 18 ? left[i] : 1 << 18;
                ssize_t sent = send(peers[i].fd, data[i], most, MSG_DONTWAIT | MSG_NOSIGNAL);
                if (sent < 0 && errno != EAGAIN)
                    die("send");
                if (sent > 0) {
                    data[i] += sent;
                    left[i] -= sent;
                }
                if (!left[i])
                    polls[i].events = POLLIN;
            }
            if (polls[i].revents & ~POLLOUT)
                receive(&peers[i]);
        }
    }
}

static int by_size(const void *one, const void *other)
{
    float a = *(const float *)one, b = *(const float *)other;
    return (a > b) - (a < b);
}

int main(int count, char **words)
{
    struct rlimit files;
    double started, used, p50 = 0, p99 = 0;
    struct peer *peers;
    if (count < 5) {
        fprintf(stderr, "usage: load PORT FUNCTION MODE NUMBER [NUMBER [SECONDS]]\n");
        return 2;
    }
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    port = atoi(words[1]);
    function = words[2];
    memset(payload, 'x', PAYLOAD);
    int first = atoi(words[4]);
    long second = count > 5 ? atol(words[5]) : 0;

    if (!strcmp(words[3], "foreground")) {
        samples = malloc(MAX_SAMPLES * sizeof *samples);
        peers = open_peers(first + second);
        started = now(), used = cpu();
        for (int i = 0; i < second; i++)
            start_worker(&peers[first + i], GRAB_JOB);
        for (int i = 0; i < first; i++)
            submit(&peers[i]);
        serve(peers, first + second, INT64_MAX, started + atof(words[6]));
    } else if (!strcmp(words[3], "submit")) {
        peers = open_peers(first);
        started = now(), used = cpu();
        flood(peers, first, second / first);
    } else if (!strcmp(words[3], "drain")) {
        peers = open_peers(first);
        started = now(), used = cpu();
        for (int i = 0; i < first; i++)
            start_worker(&peers[i], GRAB_JOB);
        serve(peers, first, second, started + 600);
    } else if (!strcmp(words[3], "idle")) {
        peers = open_peers(first);
        started = now(), used = cpu();
        for (int i = 0; i < first; i++) {
            start_worker(&peers[i], PRE_SLEEP);
            send_bare(&peers[i], ECHO_REQ); /* its answer says that the server has seen all */
        }
        serve(peers, first, first, started + 600);
    } else {
        fprintf(stderr, "load: no mode %s\n", words[3]);
        return 2;
    }
    started = now() - started, used = cpu() - used;
    if (samples && jobs_done) {
        long kept = jobs_done < MAX_SAMPLES ? jobs_done : MAX_SAMPLES;
        qsort(samples, kept, sizeof *samples, by_size);
        p50 = samples[kept / 2], p99 = samples[(long)(kept * 0.99)];
    }
    printf("%.6f %ld %.1f %.1f %.6f\n", started, jobs_done, p50, p99, used);
    fflush(stdout);
    if (!strcmp(words[3], "idle"))
        while (getchar() != EOF)
            ;
    return 0;
}
