/*
 * A client on libgearman, for tests. The workload is read from standard input; events are written one a line:
 * label, event, value in hexadecimal.
 *
 *   client PORT do|task high|normal|low FUNCTION UNIQUE
 *   client PORT background high|normal|low FUNCTION UNIQUE
 *   client PORT epoch SECONDS FUNCTION UNIQUE
 *   client PORT reduce MAPPER REDUCER
 *   client PORT tasks FUNCTION=WORKLOAD ...
 *   client PORT status HANDLE
 *   client PORT unique-status UNIQUE
 *   client PORT echo
 */
#include <libgearman-1.0/gearman.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void die(const char *what, const char *why) {
    fprintf(stderr, "%s: %s\n", what, why);
    exit(1);
}

static char *read_all(size_t *size) {
    size_t space = 1 << 16;
    char *data = malloc(space);
    *size = 0;
    for (size_t got; (got = fread(data + *size, 1, space - *size, stdin)) > 0;) {
        *size += got;
        if (*size == space)
            data = realloc(data, space *= 2);
    }
    if (*size == 0) {
        /* libgearman refuses a workload of no bytes unless it is NULL. */
        free(data);
        data = NULL;
    }
    return data;
}

static void event(const char *label, const char *name, const void *data, size_t size) {
    static const char digits[] = "0123456789abcdef";
    const unsigned char *bytes = data;
    char *text = malloc(2 * size + 1);
    for (size_t i = 0; i < size; i++) {
        text[2 * i] = digits[bytes[i] >> 4];
        text[2 * i + 1] = digits[bytes[i] & 15];
    }
    text[2 * size] = 0;
    printf("%s\t%s\t%s\n", label, name, text);
    free(text);
}

static void status_event(const char *label, unsigned numerator, unsigned denominator) {
    char text[32];
    event(label, "status", text, (size_t)snprintf(text, sizeof text, "%u/%u", numerator, denominator));
}

static gearman_return_t on_data(gearman_task_st *task) {
    event(gearman_task_function_name(task), "data", gearman_task_data(task), gearman_task_data_size(task));
    return GEARMAN_SUCCESS;
}

static gearman_return_t on_warning(gearman_task_st *task) {
    event(gearman_task_function_name(task), "warning", gearman_task_data(task), gearman_task_data_size(task));
    return GEARMAN_SUCCESS;
}

static gearman_return_t on_status(gearman_task_st *task) {
    status_event(gearman_task_function_name(task), gearman_task_numerator(task), gearman_task_denominator(task));
    return GEARMAN_SUCCESS;
}

static gearman_return_t on_complete(gearman_task_st *task) {
    event(gearman_task_function_name(task), "complete", gearman_task_data(task), gearman_task_data_size(task));
    return GEARMAN_SUCCESS;
}

static gearman_return_t on_exception(gearman_task_st *task) {
    gearman_string_t told = gearman_task_exception(task);
    event(gearman_task_function_name(task), "exception", told.c_str, told.size);
    return GEARMAN_SUCCESS;
}

static gearman_return_t on_fail(gearman_task_st *task) {
    event(gearman_task_function_name(task), "fail", "", 0);
    return GEARMAN_SUCCESS;
}

static void listen_to(gearman_client_st *client) {
    gearman_client_set_data_fn(client, on_data);
    gearman_client_set_warning_fn(client, on_warning);
    gearman_client_set_status_fn(client, on_status);
    gearman_client_set_complete_fn(client, on_complete);
    gearman_client_set_exception_fn(client, on_exception);
    gearman_client_set_fail_fn(client, on_fail);
}

static void run(gearman_client_st *client) {
    gearman_return_t code = gearman_client_run_tasks(client);
    if (code != GEARMAN_SUCCESS)
        die("run_tasks", gearman_client_error(client));
}

/* The old calls: one job, whose packets come as return codes. */
static void do_one(gearman_client_st *client, const char *priority, const char *function, const char *unique) {
    size_t size, result_size;
    char *workload = read_all(&size);
    for (;;) {
        gearman_return_t code;
        void *(*call)(gearman_client_st *, const char *, const char *, const void *, size_t, size_t *,
                      gearman_return_t *) = *priority == 'h'   ? gearman_client_do_high
                                            : *priority == 'l' ? gearman_client_do_low
                                                               : gearman_client_do;
        void *result = call(client, function, unique, workload, size, &result_size, &code);
        const char *name = code == GEARMAN_SUCCESS          ? "complete"
                           : code == GEARMAN_WORK_DATA      ? "data"
                           : code == GEARMAN_WORK_WARNING   ? "warning"
                           : code == GEARMAN_WORK_EXCEPTION ? "exception"
                           : code == GEARMAN_WORK_FAIL      ? "fail"
                                                            : NULL;
        if (code == GEARMAN_WORK_STATUS) {
            unsigned numerator, denominator;
            gearman_client_do_status(client, &numerator, &denominator);
            status_event(function, numerator, denominator);
        } else if (name != NULL)
            event(function, name, result, result == NULL ? 0 : result_size);
        else
            die("do", gearman_client_error(client));
        free(result);
        if (code == GEARMAN_SUCCESS || code == GEARMAN_WORK_EXCEPTION || code == GEARMAN_WORK_FAIL)
            break;
    }
    free(workload);
}

static void run_task(gearman_client_st *client, const char *priority, const char *function, const char *unique) {
    size_t size;
    char *workload = read_all(&size);
    gearman_return_t code;
    gearman_task_st *(*add)(gearman_client_st *, gearman_task_st *, void *, const char *, const char *,
                            const void *, size_t, gearman_return_t *) =
        *priority == 'h'   ? gearman_client_add_task_high
        : *priority == 'l' ? gearman_client_add_task_low
                           : gearman_client_add_task;
    listen_to(client);
    add(client, NULL, NULL, function, unique, workload, size, &code);
    if (code != GEARMAN_SUCCESS)
        die("add_task", gearman_client_error(client));
    run(client);
    free(workload);
}

static void submit(gearman_client_st *client, const char *priority, const char *function, const char *unique) {
    size_t size;
    char *workload = read_all(&size);
    gearman_job_handle_t handle;
    gearman_return_t (*call)(gearman_client_st *, const char *, const char *, const void *, size_t,
                             gearman_job_handle_t) = *priority == 'h'   ? gearman_client_do_high_background
                                                     : *priority == 'l' ? gearman_client_do_low_background
                                                                        : gearman_client_do_background;
    if (call(client, function, unique, workload, size, handle) != GEARMAN_SUCCESS)
        die("do_background", gearman_client_error(client));
    printf("%s\n", handle);
    free(workload);
}

static void submit_for_later(gearman_client_st *client, const char *when, const char *function, const char *unique) {
    size_t size;
    char *workload = read_all(&size);
    gearman_task_attr_t attributes = gearman_task_attr_init_epoch(atoll(when), GEARMAN_JOB_PRIORITY_NORMAL);
    gearman_argument_t argument = gearman_argument_make(NULL, 0, workload, size);
    gearman_task_st *task = gearman_execute(client, function, strlen(function), unique, strlen(unique),
                                            &attributes, &argument, NULL);
    if (task == NULL)
        die("execute", gearman_client_error(client));
    printf("%s\n", gearman_task_job_handle(task));
    free(workload);
}

static void reduce(gearman_client_st *client, const char *mapper, const char *reducer) {
    size_t size;
    char *workload = read_all(&size);
    gearman_argument_t argument = gearman_argument_make(NULL, 0, workload, size);
    gearman_task_st *task = gearman_execute_by_partition(client, mapper, strlen(mapper), reducer, strlen(reducer),
                                                         NULL, 0, NULL, &argument, NULL);
    if (task == NULL)
        die("execute_by_partition", gearman_client_error(client));
    gearman_return_t code = gearman_task_return(task);
    if (code == GEARMAN_SUCCESS) {
        gearman_result_st *result = gearman_task_result(task);
        event(mapper, "complete", gearman_result_value(result), gearman_result_size(result));
    } else
        event(mapper, code == GEARMAN_WORK_FAIL ? "fail" : gearman_strerror(code), "", 0);
    free(workload);
}

static void run_tasks(gearman_client_st *client, int count, char **tasks) {
    listen_to(client);
    for (int i = 0; i < count; i++) {
        char *workload = strchr(tasks[i], '=');
        gearman_return_t code;
        *workload++ = 0;
        gearman_client_add_task(client, NULL, NULL, tasks[i], NULL, workload, strlen(workload), &code);
        if (code != GEARMAN_SUCCESS)
            die("add_task", gearman_client_error(client));
    }
    run(client);
}

static void ask_status(gearman_client_st *client, const char *handle) {
    bool known, running;
    unsigned numerator, denominator;
    if (gearman_client_job_status(client, handle, &known, &running, &numerator, &denominator) != GEARMAN_SUCCESS)
        die("job_status", gearman_client_error(client));
    printf("%d %d %u %u\n", known, running, numerator, denominator);
}

static void ask_unique_status(gearman_client_st *client, const char *unique) {
    gearman_status_t told = gearman_client_unique_status(client, unique, strlen(unique));
    if (gearman_status_return(told) != GEARMAN_SUCCESS)
        die("unique_status", gearman_client_error(client));
    printf("%d %d %u %u %u\n", gearman_status_is_known(told), gearman_status_is_running(told),
           gearman_status_numerator(told), gearman_status_denominator(told), told.status_.mesg_.client_count);
}

static void echo(gearman_client_st *client) {
    size_t size;
    char *data = read_all(&size);
    if (gearman_client_echo(client, data, size) != GEARMAN_SUCCESS)
        die("echo", gearman_client_error(client));
    free(data);
}

int main(int count, char **arguments) {
    gearman_client_st *client = gearman_client_create(NULL);
    const char *command = count > 2 ? arguments[2] : "";
    char **rest = arguments + 3;
    if (gearman_client_add_server(client, "127.0.0.1", (in_port_t)atoi(count > 1 ? arguments[1] : "")) !=
        GEARMAN_SUCCESS)
        die("add_server", gearman_client_error(client));
    gearman_client_set_timeout(client, 30000);
    if (!gearman_client_set_server_option(client, "exceptions", strlen("exceptions")))
        die("exceptions", gearman_client_error(client));
    /* An empty unique is NULL, for which libgearman makes one up. */
    const char *unique = count > 5 && *rest[2] ? rest[2] : NULL;
    if (!strcmp(command, "do"))
        do_one(client, rest[0], rest[1], unique);
    else if (!strcmp(command, "task"))
        run_task(client, rest[0], rest[1], unique);
    else if (!strcmp(command, "background"))
        submit(client, rest[0], rest[1], unique);
    else if (!strcmp(command, "epoch"))
        submit_for_later(client, rest[0], rest[1], rest[2]);
    else if (!strcmp(command, "reduce"))
        reduce(client, rest[0], rest[1]);
    else if (!strcmp(command, "tasks"))
        run_tasks(client, count - 3, rest);
    else if (!strcmp(command, "status"))
        ask_status(client, rest[0]);
    else if (!strcmp(command, "unique-status"))
        ask_unique_status(client, rest[0]);
    else if (!strcmp(command, "echo"))
        echo(client);
    else
        die("no such command", command);
    gearman_client_free(client);
    return 0;
}
