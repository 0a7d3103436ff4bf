/* The load generator of the benchmarks: one thread, epoll, HTTP/1.1 with keep-alive; prints one JSON object.
 *
 *   load --port P [--connections C] [--seconds S] [--calls N] [--rate R] [--chunks N] [--ramp S] [--hold]
 *        [--path PATH] [--model NAME] [--header 'NAME: VALUE']...
 *
 * Without --rate each connection makes its next call as soon as it has the answer to the last one (closed loop). With
 * --rate calls are due at fixed times, R a second, and a call's latency counts from the time it was due, however late
 * it could be sent: a gateway that stalls does not slow its own examiner down (coordinated omission). --chunks N asks
 * for streams and wants N events in each; --ramp lets the connections begin one after another. --hold opens one stream
 * on each connection, prints "open" once all of them have begun, and hangs up at the end of its stdin. No two prompts
 * are alike. An answer counts only if its status is 200, its framing is right, and it carries every time stamp that the
 * mock upstream wrote (and [DONE], for a stream).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <math.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MAX_CONNECTIONS = 4096, MAX_HEAD = 8192, MAX_BODY = 1 << 24, MAX_ERRORS = 1000, SAMPLE = 160 };
enum framing { HEAD, LENGTH, SIZE, DATA, DATA_END, TRAILER, COMPLETE, BROKEN };

struct histogram { /* 32 steps to each power of two: the middle of a step is off by less than 1.6 % */
    uint64_t count, max, steps[64 * 64];
    double sum;
};

struct conn {
    int fd, busy, status, closes, stamps, digits, sampled, line;
    enum framing framing;
    size_t head_len, sent;
    uint64_t left, stamp, start_ns;
    char *request, head[MAX_HEAD + 1], tail[16], sample[SAMPLE];
};

static int port, connections = 1, expected = 1, streams, hold, errors, reconnects, in_flight;
static double seconds = 1, rate, ramp;
static uint64_t max_calls = 10000000, started, finished, stamps, salt, last_ns;
static const char *path = "/v1/chat/completions", *model = "gpt-4o-mini";
static char headers[4096], template[8192], first_error[512];
static size_t request_len, unique_at;
static int poller, timer, *idle, idle_head, idle_count;
static struct conn *conns;
static struct histogram latency, first, delay;

static void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* --- histograms -------------------------------------------------------------------------------------------------- */

static void record(struct histogram *h, uint64_t from_ns, uint64_t to_ns) {
    uint64_t v = to_ns > from_ns ? to_ns - from_ns : 0;
    int shift = v < 64 ? 0 : 58 - __builtin_clzll(v);
    h->steps[(shift << 6) + (int)(v >> shift)]++;
    h->count++;
    h->sum += (double)v;
    if (v > h->max) h->max = v;
}

static double percentile(const struct histogram *h, double percent) {
    uint64_t rank = (uint64_t)ceil((double)h->count * percent / 100), seen = 0;
    int i = 0;
    while ((seen += h->steps[i]) < rank) i++;
    double middle = ((double)(i & 63) + 0.5) * (double)(1ull << (i >> 6));
    return (middle < (double)h->max ? middle : (double)h->max) / 1000;
}

static void print_histogram(const char *name, const struct histogram *h) {
    if (!h->count) return;
    printf(", \"%s_us\": {\"p50\": %.1f, \"p90\": %.1f, \"p99\": %.1f, \"p999\": %.1f, \"max\": %.1f, \"mean\": %.1f}", name,
           percentile(h, 50), percentile(h, 90), percentile(h, 99), percentile(h, 99.9), (double)h->max / 1000,
           h->sum / (double)h->count / 1000);
}

/* --- requests ---------------------------------------------------------------------------------------------------- */

static void write_hex(char *where, uint64_t value) {
    for (int i = 15; i >= 0; i--, value >>= 4) where[i] = "0123456789abcdef"[value & 15];
}

static void prepare(void) {
    char body[2048], filler[700] = "";
    while (strlen(filler) < 600) strcat(filler, "consectetur adipiscing elit sed do eiusmod tempor ");
    int n = snprintf(body, sizeof body,
        "{\"model\":\"%s\",\"messages\":[{\"role\":\"system\",\"content\":\"You are a helpful assistant.\"},{\"role\":\"user\","
        "\"content\":\"#0123456789abcdef0123456789abcdef %s\"}],\"temperature\":0.7,\"max_tokens\":256%s}", model, filler,
        streams ? ",\"stream\":true,\"stream_options\":{\"include_usage\":true}" : "");
    request_len = (size_t)snprintf(template, sizeof template, "POST %s HTTP/1.1\r\nhost: 127.0.0.1:%d\r\naccept: */*\r\n"
        "user-agent: qlens-bench\r\ncontent-type: application/json\r\n%scontent-length: %d\r\n\r\n%s", path, port, headers, n, body);
    if (request_len >= sizeof template) die("the headers are too long");
    unique_at = (size_t)(strstr(template, "\"#") + 2 - template);
    FILE *random = fopen("/dev/urandom", "r");
    if (!random || fread(&salt, sizeof salt, 1, random) != 1) die("/dev/urandom");
    fclose(random);
    write_hex(template + unique_at, salt);
}

static void dial(struct conn *c) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
    int on = 1;
    c->fd = socket(AF_INET, SOCK_STREAM, 0);
    if (c->fd < 0 || connect(c->fd, (struct sockaddr *)&address, sizeof address)) die("connect");
    fcntl(c->fd, F_SETFL, O_NONBLOCK);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &e)) die("epoll_ctl");
}

static void redial(struct conn *c) {
    close(c->fd);
    reconnects++;
    dial(c);
}

static int send_rest(struct conn *c) { /* 0: the connection is gone */
    while (c->sent < request_len) {
        ssize_t n = send(c->fd, c->request + c->sent, request_len - c->sent, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) {
            struct epoll_event e = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
            epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
            return 1;
        }
        if (n <= 0) return 0;
        c->sent += (size_t)n;
    }
    return 1;
}

static void start(struct conn *c, uint64_t start_ns) {
    c->busy = 1;
    c->framing = HEAD;
    c->head_len = c->sent = 0;
    c->stamps = c->digits = c->sampled = c->status = c->closes = 0;
    memset(c->tail, 0, sizeof c->tail);
    c->start_ns = start_ns;
    write_hex(c->request + unique_at + 16, ++started);
    in_flight++;
    if (send_rest(c)) return;
    redial(c); /* the gateway closed it while it was idle: that is its right */
    c->sent = 0;
    send_rest(c);
}

/* --- answers ----------------------------------------------------------------------------------------------------- */

static void end(struct conn *c, uint64_t now, const char *problem) {
    c->busy = 0;
    in_flight--;
    last_ns = now;
    if (!problem && c->status != 200) problem = "its status is not 200";
    if (!problem && c->stamps != expected) problem = "time stamps are missing, or there are too many";
    if (!problem && streams && !memmem(c->tail, sizeof c->tail, "[DONE]", 6)) problem = "it does not end with [DONE]";
    if (!problem) {
        finished++;
        record(&latency, c->start_ns, now);
    } else if (!errors++) {
        snprintf(first_error, sizeof first_error, "status %d, %d time stamps: %s: %.*s", c->status, c->stamps, problem, c->sampled, c->sample);
    }
    if (problem || c->closes) redial(c);
    idle[(idle_head + idle_count++) % connections] = (int)(c - conns);
}

static void payload(struct conn *c, const char *p, size_t n, uint64_t now) {
    size_t room = SAMPLE - (size_t)c->sampled, kept = n < room ? n : room, last = n < sizeof c->tail ? n : sizeof c->tail;
    memcpy(c->sample + c->sampled, p, kept);
    c->sampled += (int)kept;
    memmove(c->tail, c->tail + last, sizeof c->tail - last);
    memcpy(c->tail + sizeof c->tail - last, p + n - last, last);
    for (const char *stop = p + n; p < stop; p++) {
        if (!c->digits) { /* between stamps */
            if (!(p = memchr(p, '@', (size_t)(stop - p)))) return;
            c->digits = 1;
            c->stamp = 0;
            continue;
        }
        int digit = *p >= '0' && *p <= '9' ? *p - '0' : *p >= 'a' && *p <= 'f' ? *p - 'a' + 10 : -1;
        c->stamp = c->stamp << 4 | (uint64_t)digit;
        if (digit < 0) c->digits = 0;
        else if (++c->digits == 17) {
            c->digits = 0;
            stamps++;
            record(&delay, c->stamp, now);
            if (!c->stamps++) record(&first, c->start_ns, now);
        }
    }
}

static const char *field(const char *head, const char *name) { /* the value of a header, or NULL */
    const char *found = strcasestr(head, name);
    return found ? found + strlen(name) + strspn(found + strlen(name), " \t") : NULL;
}

static void read_head(struct conn *c) {
    c->head[c->head_len] = 0;
    c->status = !strncmp(c->head, "HTTP/1.", 7) && c->head_len > 12 ? atoi(c->head + 9) : 0;
    const char *length = field(c->head, "\r\ncontent-length:"), *coding = field(c->head, "\r\ntransfer-encoding:");
    const char *connection = field(c->head, "\r\nconnection:");
    c->closes = connection && !strncasecmp(connection, "close", 5);
    c->left = length ? strtoull(length, NULL, 10) : 0;
    c->framing = coding && !strncasecmp(coding, "chunked", 7) ? SIZE : length ? (c->left ? LENGTH : COMPLETE) : BROKEN;
    if (c->framing == SIZE) c->left = 0;
    if (c->status / 100 == 1) c->framing = HEAD;
    c->head_len = c->line = 0;
}

static size_t take_head(struct conn *c, const char *p, size_t n) {
    size_t room = MAX_HEAD - c->head_len, taken = n < room ? n : room, before = c->head_len;
    if (!taken) return c->framing = BROKEN, n;
    memcpy(c->head + before, p, taken);
    size_t from = before > 3 ? before - 3 : 0;
    char *stop = memmem(c->head + from, before + taken - from, "\r\n\r\n", 4);
    c->head_len = before + taken;
    if (!stop) return taken;
    c->head_len = (size_t)(stop + 4 - c->head);
    taken = c->head_len - before;
    read_head(c);
    return taken;
}

static void chunk_byte(struct conn *c, char byte) { /* what stands between the chunks */
    if (c->framing == SIZE) {
        int digit = byte >= '0' && byte <= '9' ? byte - '0' : (byte | 32) >= 'a' && (byte | 32) <= 'f' ? (byte | 32) - 'a' + 10 : -1;
        if (byte == '\n') c->framing = c->left ? DATA : TRAILER, c->line = 0;
        else if (digit >= 0 && !c->line) c->left = c->left << 4 | (uint64_t)digit;
        else c->line = 1; /* an extension, or the carriage return */
        if (c->left > MAX_BODY) c->framing = BROKEN;
    } else if (c->framing == DATA_END) {
        if (byte == '\n') c->framing = SIZE, c->line = 0;
        else if (byte != '\r') c->framing = BROKEN;
    } else if (byte == '\n') {
        if (!c->line) c->framing = COMPLETE;
        c->line = 0;
    } else if (byte != '\r') c->line = 1;
}

static void feed(struct conn *c, const char *p, size_t n, uint64_t now) {
    while (n && c->framing < COMPLETE) {
        size_t taken = 1;
        if (c->framing == HEAD) taken = take_head(c, p, n);
        else if (c->framing == LENGTH || c->framing == DATA) {
            taken = n < c->left ? n : c->left;
            payload(c, p, taken, now);
            if (!(c->left -= taken)) c->framing = c->framing == DATA ? DATA_END : COMPLETE;
        } else chunk_byte(c, *p);
        p += taken;
        n -= taken;
    }
    if (n) c->framing = BROKEN; /* bytes after the answer */
}

static void receive(struct conn *c) {
    static char buffer[1 << 18];
    ssize_t n = recv(c->fd, buffer, sizeof buffer, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    uint64_t now = now_ns();
    if (!c->busy) {
        redial(c);
        return;
    }
    if (n <= 0) return end(c, now, "the connection broke");
    feed(c, buffer, (size_t)n, now);
    if (c->framing == BROKEN) end(c, now, "its framing is wrong");
    else if (c->framing == COMPLETE) end(c, now, NULL);
}

/* --- the run ----------------------------------------------------------------------------------------------------- */

static int launch(uint64_t began, uint64_t until) { /* 0: there is nothing more to start */
    for (;;) {
        uint64_t now = now_ns(), due = now;
        if (rate > 0) due = began + (uint64_t)((double)started * 1e9 / rate);
        else if (started < (uint64_t)connections) due = began + (uint64_t)((double)started * 1e9 * ramp / connections);
        if (started >= max_calls || due >= until || errors >= MAX_ERRORS) return 0;
        if (due > now) {
            struct itimerspec when = {.it_value = {(time_t)(due / 1000000000u), (long)(due % 1000000000u)}};
            timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
            return 1;
        }
        if (!idle_count) return 1;
        struct conn *c = &conns[idle[idle_head]];
        idle_head = (idle_head + 1) % connections;
        idle_count--;
        start(c, rate > 0 ? due : now);
    }
}

static int all_open(void) {
    for (int i = 0; i < connections; i++)
        if (!conns[i].stamps) return 0;
    return 1;
}

static void wait_for_events(void) {
    struct epoll_event ready[256];
    uint64_t expired;
    int n = epoll_wait(poller, ready, 256, 100);
    for (int i = 0; i < n; i++) {
        struct conn *c = ready[i].data.ptr;
        if (!c) (void)!read(timer, &expired, sizeof expired);
        else if (ready[i].events & EPOLLOUT) {
            struct epoll_event e = {.events = EPOLLIN, .data.ptr = c};
            epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
            send_rest(c); /* when it fails, reading fails as well */
        } else receive(c);
    }
}

static void hold_open(void) {
    puts("open");
    fflush(stdout);
    struct pollfd input = {.fd = 0, .events = POLLIN};
    poll(&input, 1, (int)(seconds * 1000));
}

static void run(uint64_t began) {
    uint64_t until = began + (uint64_t)(seconds * 1e9), patience = (uint64_t)(rate > 0 ? 3e9 : 20e9);
    if (hold) max_calls = (uint64_t)connections;
    last_ns = began;
    while (launch(began, until) || in_flight) {
        wait_for_events();
        if (hold && all_open()) return hold_open();
        if (now_ns() > until + patience) return;
    }
}

static void parse(int argc, char **argv) {
    static const struct option options[] = {
        {"port", 1, 0, 'p'}, {"connections", 1, 0, 'c'}, {"seconds", 1, 0, 's'}, {"calls", 1, 0, 'n'}, {"rate", 1, 0, 'r'},
        {"chunks", 1, 0, 'k'}, {"ramp", 1, 0, 'a'}, {"hold", 0, 0, 'o'}, {"path", 1, 0, 'u'}, {"model", 1, 0, 'm'}, {"header", 1, 0, 'h'}, {0, 0, 0, 0}};
    for (int option; (option = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        if (option == 'p') port = atoi(optarg);
        else if (option == 'c') connections = atoi(optarg);
        else if (option == 's') seconds = atof(optarg);
        else if (option == 'n') max_calls = strtoull(optarg, NULL, 10);
        else if (option == 'r') rate = atof(optarg);
        else if (option == 'k') expected = atoi(optarg), streams = 1;
        else if (option == 'a') ramp = atof(optarg);
        else if (option == 'o') hold = 1;
        else if (option == 'u') path = optarg;
        else if (option == 'm') model = optarg;
        else if (option == 'h') snprintf(headers + strlen(headers), sizeof headers - strlen(headers), "%s\r\n", optarg);
        else exit(2);
    }
    if (port < 1 || connections < 1 || connections > MAX_CONNECTIONS || seconds <= 0 || seconds > 600 || expected < 1) {
        fputs("load: --port, 1 to 4096 --connections, up to 600 --seconds, 1 or more --chunks\n", stderr);
        exit(2);
    }
}

int main(int argc, char **argv) {
    signal(SIGPIPE, SIG_IGN);
    parse(argc, argv);
    prepare();
    poller = epoll_create1(0);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    struct epoll_event e = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, timer, &e)) die("epoll_ctl");
    conns = calloc((size_t)connections, sizeof *conns);
    idle = calloc((size_t)connections, sizeof *idle);
    for (int i = 0; i < connections; i++) {
        if (!(conns[i].request = malloc(request_len + 1))) die("malloc");
        memcpy(conns[i].request, template, request_len + 1);
        dial(&conns[i]);
        idle[idle_count++] = i;
    }
    uint64_t began = now_ns();
    run(began);
    struct rusage own;
    getrusage(RUSAGE_SELF, &own);
    double cpu = (double)(own.ru_utime.tv_sec + own.ru_stime.tv_sec) + (double)(own.ru_utime.tv_usec + own.ru_stime.tv_usec) / 1e6;
    uint64_t wanted = rate > 0 ? (uint64_t)(seconds * rate) : started;
    if (wanted > max_calls) wanted = max_calls;
    if (hold) finished = started, wanted = started; /* they were meant to be left open */
    printf("{\"calls\": %llu, \"errors\": %d, \"unfinished\": %llu, \"reconnects\": %d, \"seconds\": %.6f, \"cpu_seconds\": %.6f, "
           "\"chunks\": %llu", (unsigned long long)finished, errors,
           (unsigned long long)(wanted > finished + (uint64_t)errors ? wanted - finished - (uint64_t)errors : 0), reconnects,
           (double)(last_ns - began) / 1e9, cpu, (unsigned long long)(streams ? stamps : 0));
    if (*first_error) {
        fputs(", \"first_error\": \"", stdout);
        for (const char *p = first_error; *p; p++) putchar(*p == '"' ? '\'' : *p < ' ' || *p > '~' || *p == '\\' ? ' ' : *p);
        putchar('"');
    }
    print_histogram("latency", &latency);
    print_histogram("first", &first);
    print_histogram("delay", &delay);
    puts("}");
}
