/*
 * A worker on libgearman, for tests.
 *
 *   worker PORT PREFIX [LIMIT]
 *
 * Functions begin with PREFIX: reverse, report, unique, fail, throw, hold, meet and map. LIMIT is a time limit of
 * milliseconds for all of them (CAN_DO_TIMEOUT).
 */
#include <dirent.h>
#include <libgearman-1.0/gearman.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char *text_of(gearman_job_st *job, char *text) {
    size_t size = gearman_job_workload_size(job);
    size = size < PATH_MAX - 1 ? size : PATH_MAX - 1;
    memcpy(text, gearman_job_workload(job), size);
    text[size] = 0;
    return text;
}

static gearman_return_t reverse(gearman_job_st *job, void *context) {
    const char *workload = gearman_job_workload(job);
    size_t size = gearman_job_workload_size(job);
    char *result = malloc(size + 1);
    for (size_t i = 0; i < size; i++)
        result[i] = workload[size - 1 - i];
    gearman_return_t code = gearman_job_send_complete(job, result, size);
    free(result);
    (void)context;
    return code;
}

static gearman_return_t report(gearman_job_st *job, void *context) {
    for (unsigned step = 1; step <= 3; step++) {
        char part[16];
        int size = snprintf(part, sizeof part, "part %u", step);
        gearman_job_send_status(job, step, 3);
        gearman_job_send_data(job, part, (size_t)size);
    }
    gearman_job_send_warning(job, "almost", 6);
    (void)context;
    return gearman_job_send_complete(job, "done", 4);
}

static gearman_return_t unique(gearman_job_st *job, void *context) {
    const char *text = gearman_job_unique(job);
    (void)context;
    return gearman_job_send_complete(job, text, strlen(text));
}

static gearman_return_t fail(gearman_job_st *job, void *context) {
    (void)job, (void)context;
    return GEARMAN_FATAL;
}

static gearman_return_t throw(gearman_job_st *job, void *context) {
    (void)context;
    return gearman_job_send_exception(job, "no luck", 7);
}

/* Say who runs it, and run until somebody makes the file. */
static gearman_return_t hold(gearman_job_st *job, void *context) {
    char path[PATH_MAX], pids[PATH_MAX + 8];
    (void)context;
    text_of(job, path);
    snprintf(pids, sizeof pids, "%s.pids", path);
    FILE *file = fopen(pids, "a");
    fprintf(file, "%d\n", getpid());
    fclose(file);
    gearman_job_send_status(job, 1, 3);
    while (access(path, F_OK))
        usleep(5000);
    char pid[16];
    int size = snprintf(pid, sizeof pid, "%d", getpid());
    return gearman_job_send_complete(job, pid, (size_t)size);
}

/* Come to a folder, and wait until three are there. */
static gearman_return_t meet(gearman_job_st *job, void *context) {
    char folder[PATH_MAX], mark[PATH_MAX + 16];
    (void)context;
    text_of(job, folder);
    snprintf(mark, sizeof mark, "%s/%d", folder, getpid());
    fclose(fopen(mark, "w"));
    for (int tries = 0; tries < 2000; tries++) {
        int there = 0;
        DIR *listing = opendir(folder);
        for (struct dirent *entry; (entry = readdir(listing)) != NULL;)
            there += *entry->d_name != '.';
        closedir(listing);
        if (there >= 3)
            return gearman_job_send_complete(job, "met", 3);
        usleep(5000);
    }
    return gearman_job_send_fail(job);
}

/* Each word is a job of the reducer; the aggregator puts their results together. */
static gearman_return_t map(gearman_job_st *job, void *context) {
    const char *text = gearman_job_workload(job), *end = text + gearman_job_workload_size(job);
    (void)context;
    while (text < end) {
        const char *space = memchr(text, ' ', (size_t)(end - text));
        const char *stop = space == NULL ? end : space;
        gearman_return_t code = gearman_job_send_data(job, text, (size_t)(stop - text));
        if (code != GEARMAN_SUCCESS)
            return code;
        text = stop + 1;
    }
    return GEARMAN_SUCCESS;
}

static gearman_return_t join(gearman_aggregator_st *aggregator, gearman_task_st *task, gearman_result_st *result) {
    char joined[4096];
    size_t size = 0;
    (void)aggregator;
    for (; task != NULL; task = gearman_next(task)) {
        gearman_result_st *part = gearman_task_result(task);
        if (part == NULL)
            return GEARMAN_FATAL;
        memcpy(joined + size, gearman_result_value(part), gearman_result_size(part));
        size += gearman_result_size(part);
        joined[size++] = ' ';
    }
    gearman_result_store_value(result, joined, size ? size - 1 : 0);
    return GEARMAN_SUCCESS;
}

static unsigned limit;

static void offer(gearman_worker_st *worker, const char *prefix, const char *name, gearman_function_t function) {
    char whole[128];
    int size = snprintf(whole, sizeof whole, "%s%s", prefix, name);
    if (gearman_worker_define_function(worker, whole, (size_t)size, function, limit, NULL) != GEARMAN_SUCCESS) {
        fprintf(stderr, "%s: %s\n", whole, gearman_worker_error(worker));
        exit(1);
    }
}

int main(int count, char **arguments) {
    if (count < 3)
        return 2;
    gearman_worker_st *worker = gearman_worker_create(NULL);
    const char *prefix = arguments[2];
    limit = count > 3 ? (unsigned)atoi(arguments[3]) : 0;
    gearman_worker_add_server(worker, "127.0.0.1", (in_port_t)atoi(arguments[1]));
    offer(worker, prefix, "reverse", gearman_function_create(reverse));
    offer(worker, prefix, "report", gearman_function_create(report));
    offer(worker, prefix, "unique", gearman_function_create(unique));
    offer(worker, prefix, "fail", gearman_function_create(fail));
    offer(worker, prefix, "throw", gearman_function_create(throw));
    offer(worker, prefix, "hold", gearman_function_create(hold));
    offer(worker, prefix, "meet", gearman_function_create(meet));
    offer(worker, prefix, "map", gearman_function_create_partition(map, join));
    for (;;) {
        gearman_return_t code = gearman_worker_work(worker);
        if (gearman_failed(code) && code != GEARMAN_WORK_EXCEPTION && code != GEARMAN_WORK_FAIL)
            fprintf(stderr, "work: %s\n", gearman_worker_error(worker));
    }
}
