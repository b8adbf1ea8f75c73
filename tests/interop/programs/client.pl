# A client of Perl, for tests; commands and output are those of client.c as far as the module has them.
use strict;
use warnings FATAL => "all";
use Gearman::Client;

my ($port, $command, @rest) = @ARGV;
my $client = Gearman::Client->new(job_servers => ["127.0.0.1:$port"], exceptions => 1);
binmode $_ for *STDIN, *STDOUT;

sub event {
    my ($label, $name, $value) = @_;
    print "$label\t$name\t", unpack("H*", $value), "\n";
}

sub workload { local $/; my $data = <STDIN>; return defined $data ? $data : "" }

sub callbacks {
    my ($function) = @_;
    return (
        on_data      => sub { event($function, "data",      ${ $_[0] }) },
        on_warning   => sub { event($function, "warning",   ${ $_[0] }) },
        on_status    => sub { event($function, "status",    "$_[0]/$_[1]") },
        on_complete  => sub { event($function, "complete",  ${ $_[0] }) },
        on_exception => sub { event($function, "exception", $_[0]) },
        on_fail      => sub { event($function, "fail",      "") },
        timeout      => 30,
    );
}

if ($command eq "do" or $command eq "task") {
    my ($priority, $function, $unique) = @rest;
    my %options = (callbacks($function), priority => $priority, uniq => $unique);
    if ($command eq "do") {
        $client->do_task($function, workload(), \%options);
    }
    else {
        my $set = $client->new_task_set;
        $set->add_task($function, workload(), \%options);
        $set->wait(timeout => 30);
    }
}
elsif ($command eq "background") {
    my ($priority, $function, $unique) = @rest;
    my $handle = $client->dispatch_background($function, workload(), { priority => $priority, uniq => $unique });
    # Its handles begin with the server: "127.0.0.1:4730//H:...".
    print $handle =~ s{^.*//}{}r, "\n";
}
elsif ($command eq "tasks") {
    my $set = $client->new_task_set;
    for my $task (@rest) {
        my ($function, $workload) = split /=/, $task, 2;
        $set->add_task($function, $workload, { callbacks($function) });
    }
    $set->wait(timeout => 30);
}
elsif ($command eq "status") {
    my $status = $client->get_status("127.0.0.1:$port//$rest[0]");
    my ($numerator, $denominator) = @{ $status->progress || [0, 0] };
    printf "%d %d %d %d\n", $status->known, $status->running, $numerator, $denominator;
}
else {
    die "no such command: $command";
}
