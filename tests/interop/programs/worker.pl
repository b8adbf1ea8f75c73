# A worker of Perl, for tests; arguments and functions are those of worker.c as far as the module has them.
use strict;
use warnings;
use Gearman::Worker;
use Time::HiRes "sleep";

my ($port, $prefix, $limit) = @ARGV;
my $worker = Gearman::Worker->new(job_servers => ["127.0.0.1:$port"]);

my %functions = (
    reverse => sub { return scalar reverse $_[0]->arg },
    report  => sub {
        my ($job) = @_;
        for my $step (1 .. 3) {
            $job->set_status($step, 3);
            $worker->send_work_data($job, "part $step");
        }
        $worker->send_work_warning($job, "almost");
        return "done";
    },
    fail  => sub { return undef },
    # WORK_EXCEPTION with the text in Storable's form, and then WORK_FAIL.
    die   => sub { die "no luck\n" },
    throw => sub { $worker->send_work_exception($_[0], "no luck"); return undef },
    hold  => sub {
        my ($job) = @_;
        my $path = $job->arg;
        open my $file, ">>", "$path.pids" or die $!;
        print $file "$$\n";
        close $file;
        $job->set_status(1, 3);
        sleep 0.005 until -e $path;
        return $$;
    },
    meet => sub {
        my $folder = $_[0]->arg;
        open my $mark, ">", "$folder/$$" or die $!;
        for (1 .. 2000) {
            return "met" if (() = glob "$folder/*") >= 3;
            sleep 0.005;
        }
        return undef;
    },
    # What Perl takes for false.
    zero  => sub { return "0" },
    empty => sub { return "" },
);
for my $name (sort keys %functions) {
    $worker->register_function("$prefix$name", $limit ? $limit : (), $functions{$name});
}
$worker->work while 1;
