<?php
// A client of PHP, for tests; commands and output are those of client.c, which has epoch and reduce beside them.
[, $port, $command] = $argv;
$rest = array_slice($argv, 3);
$client = new GearmanClient();
$client->addServer("127.0.0.1", (int) $port);
$client->setTimeout(30000);
$client->enableExceptionHandler();

function event(string $label, string $name, string $value): void {
    echo "$label\t$name\t", bin2hex($value), "\n";
}

function workload(): string {
    return stream_get_contents(STDIN);
}

function listen_to(GearmanClient $client): void {
    $client->setDataCallback(fn ($task) => event($task->functionName(), "data", $task->data()));
    $client->setWarningCallback(fn ($task) => event($task->functionName(), "warning", $task->data()));
    $client->setStatusCallback(
        fn ($task) => event($task->functionName(), "status", $task->taskNumerator() . "/" . $task->taskDenominator())
    );
    $client->setCompleteCallback(fn ($task) => event($task->functionName(), "complete", (string) $task->data()));
    $client->setExceptionCallback(fn ($task) => event($task->functionName(), "exception", $task->data()));
    $client->setFailCallback(fn ($task) => event($task->functionName(), "fail", ""));
}

function run(GearmanClient $client): void {
    if (!$client->runTasks()) {
        throw new Exception($client->error());
    }
}

switch ($command) {
    case "do":
        [$priority, $function, $unique] = $rest;
        $method = ["high" => "doHigh", "normal" => "doNormal", "low" => "doLow"][$priority];
        $workload = workload();
        // As in PHP's manual: call again until it is done.
        do {
            $result = $client->$method($function, $workload, $unique ?: null);
            $code = $client->returnCode();
            match ($code) {
                GEARMAN_WORK_DATA => event($function, "data", $result),
                GEARMAN_WORK_WARNING => event($function, "warning", $result),
                GEARMAN_WORK_STATUS => event($function, "status", implode("/", $client->doStatus())),
                GEARMAN_WORK_FAIL => event($function, "fail", ""),
                GEARMAN_WORK_EXCEPTION => event($function, "exception", (string) $result),
                GEARMAN_SUCCESS => event($function, "complete", (string) $result),
                default => throw new Exception($client->error()),
            };
        } while (!in_array($code, [GEARMAN_SUCCESS, GEARMAN_WORK_FAIL, GEARMAN_WORK_EXCEPTION]));
        break;
    case "task":
        [$priority, $function, $unique] = $rest;
        $method = ["high" => "addTaskHigh", "normal" => "addTask", "low" => "addTaskLow"][$priority];
        listen_to($client);
        $client->$method($function, workload(), null, $unique ?: null);
        run($client);
        break;
    case "background":
        [$priority, $function, $unique] = $rest;
        $method = ["high" => "doHighBackground", "normal" => "doBackground", "low" => "doLowBackground"][$priority];
        echo $client->$method($function, workload(), $unique ?: null), "\n";
        break;
    case "tasks":
        listen_to($client);
        foreach ($rest as $task) {
            $client->addTask(...explode("=", $task, 2));
        }
        run($client);
        break;
    case "status":
        echo implode(" ", array_map(intval(...), $client->jobStatus($rest[0]))), "\n";
        break;
    case "unique-status":
        echo implode(" ", array_map(intval(...), $client->jobStatusByUniqueKey($rest[0]))), "\n";
        break;
    case "echo":
        $client->ping(workload()) || throw new Exception($client->error());
        break;
    default:
        throw new Exception("no such command: $command");
}
