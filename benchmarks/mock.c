/* The mock upstream of the benchmarks: one thread, epoll, prepared answers; it must never be what is measured.
 *
 *   mock            listens on a free port of 127.0.0.1 and prints it
 *   stdin           "CHUNKS GAP_US FAIL_EVERY\n" sets what is to come; the answer is the number of calls so far
 *
 * A body with "stream":true gets a stream of CHUNKS events of about 217 bytes, GAP_US apart (0: all at once), and the
 * usage event when the body asks for it; everything else gets a chat completion of about 1.1 KB. One call in FAIL_EVERY
 * gets a 500 instead (0: none does). Each event, and each whole answer, carries '@' and 16 hex digits in its text: the
 * monotonic time in nanoseconds at which it was written. It ends with its stdin, and in any case after an hour.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MAX_REQUEST = 1 << 20, MAX_CHUNKS = 100000, HOUR = 3600 };

struct conn {
    int fd; /* -1: closed, freed once it has left the queue */
    char *in, *out;
    size_t in_len, in_cap, out_len, out_off, out_cap;
    int chunks_left, wants_usage, queued, blocked;
    uint64_t gap_ns, due_ns;
    struct conn *next;
};

static struct conn *head, *tail; /* streams by the time of their next event: all gaps of a run are equal */
static int poller, timer, chunks = 100;
static uint64_t gap_ns, calls, fail_every;
static char answer[4096], event[1024];
static size_t answer_len, answer_stamp, event_len, event_stamp;

static const char STREAM_HEAD[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                                  "x-request-id: req-bench\r\ntransfer-encoding: chunked\r\n\r\n";
static const char FAILURE[] = "HTTP/1.1 500 Internal Server Error\r\ncontent-type: application/json\r\ncontent-length: 77\r\n\r\n"
                              "{\"error\":{\"message\":\"out of order\",\"type\":\"server_error\",\"code\":\"a_failure\"}}";
#define EVENT_HEAD "data: {\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion.chunk\",\"created\":1790000000," \
                   "\"model\":\"gpt-4o-mini-2024-07-18\",\"choices\":["
static const char LAST[] = EVENT_HEAD "{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}\n\n";
static const char USAGE[] = EVENT_HEAD "],\"usage\":{\"prompt_tokens\":180,\"completion_tokens\":100,\"total_tokens\":280,"
                                       "\"prompt_tokens_details\":{\"cached_tokens\":0}}}\n\n";
static const char DONE[] = "data: [DONE]\n\n";

static void die(const char *what) {
    perror(what);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void stamp(char *where) {
    uint64_t now = now_ns();
    for (int i = 15; i >= 0; i--, now >>= 4) where[i] = "0123456789abcdef"[now & 15];
}

static void prepare(void) {
    char body[2048], filler[800];
    memset(filler, 0, sizeof filler);
    while (strlen(filler) < 640) strcat(filler, "lorem ipsum dolor sit amet ");
    int n = snprintf(body, sizeof body,
        "{\"id\":\"chatcmpl-bench\",\"object\":\"chat.completion\",\"created\":1790000000,\"model\":\"gpt-4o-mini-2024-07-18\","
        "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"@0123456789abcdef %s\",\"refusal\":null},"
        "\"logprobs\":null,\"finish_reason\":\"stop\"}],\"usage\":{\"prompt_tokens\":180,\"completion_tokens\":160,"
        "\"total_tokens\":340,\"prompt_tokens_details\":{\"cached_tokens\":0,\"audio_tokens\":0},"
        "\"completion_tokens_details\":{\"reasoning_tokens\":0,\"audio_tokens\":0}},\"system_fingerprint\":\"fp_bench\"}", filler);
    answer_len = (size_t)snprintf(answer, sizeof answer, "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
        "x-request-id: req-bench\r\ncontent-length: %d\r\n\r\n%s", n, body);
    answer_stamp = (size_t)(strchr(answer, '@') + 1 - answer);
    const char *text = EVENT_HEAD "{\"index\":0,\"delta\":{\"content\":\"@0123456789abcdef lorem \"},\"finish_reason\":null}]}\n\n";
    event_len = (size_t)snprintf(event, sizeof event, "%zx\r\n%s\r\n", strlen(text), text);
    event_stamp = (size_t)(strchr(event, '@') + 1 - event);
}

static void watch(struct conn *c, int op) {
    struct epoll_event e = {.events = EPOLLIN | (c->out_len > c->out_off ? EPOLLOUT : 0), .data.ptr = c};
    if (epoll_ctl(poller, op, c->fd, &e)) die("epoll_ctl");
}

static void hang_up(struct conn *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    if (c->queued) return;
    free(c->in);
    free(c->out);
    free(c);
}

static void put(struct conn *c, const void *bytes, size_t n) {
    if (c->out_len + n > c->out_cap) {
        c->out_cap = 2 * (c->out_len + n) + 4096;
        if (!(c->out = realloc(c->out, c->out_cap))) die("realloc");
    }
    memcpy(c->out + c->out_len, bytes, n);
    c->out_len += n;
}

static int flush(struct conn *c) { /* 0: the connection is gone */
    while (c->out_off < c->out_len) {
        ssize_t n = send(c->fd, c->out + c->out_off, c->out_len - c->out_off, MSG_NOSIGNAL);
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) break;
        if (n <= 0) return hang_up(c), 0;
        c->out_off += (size_t)n;
    }
    int blocked = c->out_off < c->out_len;
    if (!blocked) c->out_len = c->out_off = 0;
    if (blocked != c->blocked) watch(c, EPOLL_CTL_MOD);
    c->blocked = blocked;
    return 1;
}

static void put_chunk(struct conn *c, const char *text, size_t n) {
    char size[16];
    put(c, size, (size_t)sprintf(size, "%zx\r\n", n));
    put(c, text, n);
    put(c, "\r\n", 2);
}

static void put_event(struct conn *c) {
    stamp(event + event_stamp);
    put(c, event, event_len);
    if (--c->chunks_left) return;
    put_chunk(c, LAST, sizeof LAST - 1);
    if (c->wants_usage) put_chunk(c, USAGE, sizeof USAGE - 1);
    put_chunk(c, DONE, sizeof DONE - 1);
    put(c, "0\r\n\r\n", 5);
}

static void enqueue(struct conn *c) {
    c->queued = 1;
    c->next = NULL;
    *(head ? &tail->next : &head) = c;
    tail = c;
}

static void answer_call(struct conn *c, const char *body, size_t n) {
    calls++;
    if (fail_every && calls % fail_every == 0) return put(c, FAILURE, sizeof FAILURE - 1);
    if (!memmem(body, n, "\"stream\":true", 13) && !memmem(body, n, "\"stream\": true", 14)) {
        stamp(answer + answer_stamp);
        put(c, answer, answer_len);
        return;
    }
    c->wants_usage = memmem(body, n, "\"include_usage\":true", 20) || memmem(body, n, "\"include_usage\": true", 21);
    c->chunks_left = chunks;
    c->gap_ns = gap_ns;
    c->due_ns = now_ns() + gap_ns;
    put(c, STREAM_HEAD, sizeof STREAM_HEAD - 1);
    do put_event(c);
    while (c->chunks_left && !c->gap_ns);
    if (c->chunks_left && !c->queued) enqueue(c);
}

static size_t request_length(char *in, size_t n) { /* 0: more bytes are needed; the body's start is where the head ends */
    char *end = memmem(in, n, "\r\n\r\n", 4);
    if (!end) return 0;
    *end = 0;
    char *length = strcasestr(in, "\r\ncontent-length:"), *chunked = strcasestr(in, "\r\ntransfer-encoding: chunked");
    *end = '\r';
    size_t start = (size_t)(end + 4 - in);
    if (chunked) {
        char *last = memmem(in + start, n - start, "0\r\n\r\n", 5);
        return last ? (size_t)(last + 5 - in) : 0;
    }
    size_t total = start + (length ? strtoul(length + 17, NULL, 10) : 0);
    return n >= total ? total : 0;
}

static void receive(struct conn *c) {
    if (c->in_cap - c->in_len < 16384) {
        c->in_cap += 65536;
        if (c->in_cap > MAX_REQUEST || !(c->in = realloc(c->in, c->in_cap))) die("a request is too large");
    }
    ssize_t n = recv(c->fd, c->in + c->in_len, c->in_cap - c->in_len, 0);
    if (n < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (n <= 0) return hang_up(c);
    c->in_len += (size_t)n;
    size_t length;
    while (!c->chunks_left && (length = request_length(c->in, c->in_len))) {
        answer_call(c, c->in, length);
        memmove(c->in, c->in + length, c->in_len -= length);
    }
    if (c->out_len) flush(c);
}

static void tick(void) { /* write the events that are due, then sleep until the next one is */
    while (head && head->due_ns <= now_ns()) {
        struct conn *c = head;
        head = c->next;
        c->queued = 0;
        if (c->fd < 0) {
            hang_up(c);
            continue;
        }
        put_event(c);
        c->due_ns += c->gap_ns;
        if (c->chunks_left) enqueue(c);
        flush(c);
    }
    if (!head) return;
    struct itimerspec when = {.it_value = {(time_t)(head->due_ns / 1000000000u), (long)(head->due_ns % 1000000000u)}};
    timerfd_settime(timer, TFD_TIMER_ABSTIME, &when, NULL);
}

static void command(void) {
    char line[64];
    ssize_t n = read(0, line, sizeof line - 1);
    if (n <= 0) exit(0);
    line[n] = 0;
    unsigned long gap_us, every;
    if (sscanf(line, "%d %lu %lu", &chunks, &gap_us, &every) != 3 || chunks < 1 || chunks > MAX_CHUNKS) exit(2);
    gap_ns = gap_us * 1000;
    fail_every = every;
    printf("%llu\n", (unsigned long long)calls);
    fflush(stdout);
}

static void welcome(int listener) {
    int fd, on = 1;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        struct conn *c = calloc(1, sizeof *c);
        if (!c) die("calloc");
        c->fd = fd;
        watch(c, EPOLL_CTL_ADD);
    }
}

int main(void) {
    static int marks[3]; /* their addresses stand for the descriptors that are no connection */
    signal(SIGPIPE, SIG_IGN);
    alarm(HOUR);
    prepare();
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)) die("listen");
    getsockname(listener, (struct sockaddr *)&address, &size);
    poller = epoll_create1(0);
    timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    int fds[3] = {0, listener, timer};
    for (int i = 0; i < 3; i++) {
        struct epoll_event e = {.events = EPOLLIN, .data.ptr = &marks[i]};
        if (epoll_ctl(poller, EPOLL_CTL_ADD, fds[i], &e)) die("epoll_ctl");
    }
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        struct epoll_event ready[256];
        int n = epoll_wait(poller, ready, 256, -1);
        for (int i = 0; i < n; i++) {
            struct conn *c = ready[i].data.ptr;
            uint64_t expired;
            if (ready[i].data.ptr == &marks[0]) command();
            else if (ready[i].data.ptr == &marks[1]) welcome(listener);
            else if (ready[i].data.ptr == &marks[2]) (void)!read(timer, &expired, sizeof expired);
            else if (!(ready[i].events & EPOLLOUT) || flush(c)) receive(c);
        }
        tick();
    }
}
