<?php
// A worker of PHP, for tests; arguments and functions are those of worker.c, which has map beside them.
[, $port, $prefix] = $argv;
$limit = (int) ($argv[3] ?? 0);
$worker = new GearmanWorker();
$worker->addServer("127.0.0.1", (int) $port);

$functions = [
    "reverse" => fn ($job) => strrev($job->workload()),
    "report" => function ($job) {
        for ($step = 1; $step <= 3; $step++) {
            $job->sendStatus($step, 3);
            $job->sendData("part $step");
        }
        $job->sendWarning("almost");
        return "done";
    },
    "unique" => fn ($job) => $job->unique(),
    "fail" => fn ($job) => $job->sendFail(),
    "throw" => fn ($job) => $job->sendException("no luck"),
    "hold" => function ($job) {
        $path = $job->workload();
        file_put_contents("$path.pids", getmypid() . "\n", FILE_APPEND);
        $job->sendStatus(1, 3);
        while (!file_exists($path)) {
            usleep(5000);
            clearstatcache();
        }
        return (string) getmypid();
    },
    "meet" => function ($job) {
        $folder = $job->workload();
        touch("$folder/" . getmypid());
        for ($tries = 0; $tries < 2000; $tries++) {
            if (count(glob("$folder/*")) >= 3) {
                return "met";
            }
            usleep(5000);
        }
        $job->sendFail();
    },
];
foreach ($functions as $name => $function) {
    $worker->addFunction("$prefix$name", $function, null, $limit);
}
while (true) {
    $worker->work();
}
