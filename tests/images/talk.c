/*
 * Two ends that talk: a server that answers every message with "you said " and the
 * message, and a client that says one and prints the answer. Of tcp, udp (an IPv4 or
 * IPv6 address and a port) or unix (a path):
 *   talk serve udp :: 7000
 *   talk ask unix /run/x.sock hello
 * A client tries for 20 s, as its server may not be there yet.
 *
 * A client that sends each text by itself, once, and wants no answer; unixgram and
 * unixpacket are the other kinds of unix sockets:
 *   talk tell unixgram /dev/log one two
 *
 * And one end of a measurement, whose other end is there and has the clock: it sends so
 * many MiB, or reads up to the end, or sends back what it reads. An end of UDP sends packets of
 * 1,400 bytes, and ends with empty ones.
 *   talk send tcp 10.88.1.1 7000 64
 *   talk drain tcp 10.88.1.1 7000
 *   talk echo tcp 10.88.1.1 7000
 *
 * Two ends that have the clock themselves: one that is sent to and prints the bytes and
 * microseconds from the first to the last, and one that asks a server for so many seconds, anew
 * each time, and prints how often it was answered.
 *   talk time udp :: 7000
 *   talk rate tcp 10.88.1.1 7000 2
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* What fits a packet of Ethernet. */
#define PACKET 1400

static struct sockaddr_storage address;
static socklen_t length;

/* Reads a kind of socket and its address from argv; gives how many there were. */
static int parse(char **argv, int *type)
{
	struct sockaddr_un *path = (struct sockaddr_un *)&address;
	struct sockaddr_in *v4 = (struct sockaddr_in *)&address;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&address;

	*type = strcmp(argv[0], "udp") ? SOCK_STREAM : SOCK_DGRAM;
	if (!strncmp(argv[0], "unix", 4)) {
		if (!strcmp(argv[0], "unixgram"))
			*type = SOCK_DGRAM;
		if (!strcmp(argv[0], "unixpacket"))
			*type = SOCK_SEQPACKET;
		path->sun_family = AF_UNIX;
		strncpy(path->sun_path, argv[1], sizeof(path->sun_path) - 1);
		length = sizeof(*path);
		return 2;
	}
	if (inet_pton(AF_INET, argv[1], &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons(atoi(argv[2]));
		length = sizeof(*v4);
	} else if (inet_pton(AF_INET6, argv[1], &v6->sin6_addr) == 1) {
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons(atoi(argv[2]));
		length = sizeof(*v6);
	} else {
		return 0;
	}
	return 3;
}

static void answer(int socket, const char *text, const struct sockaddr *to, socklen_t to_length)
{
	char said[2048];
	int size = snprintf(said, sizeof(said), "you said %s", text);

	if (sendto(socket, said, size, MSG_NOSIGNAL, to, to_length) < 0)
		perror("talk: send");
}

static int serve(int type)
{
	int on = 1, server = socket(address.ss_family, type, 0);

	setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(server, (struct sockaddr *)&address, length) || (type == SOCK_STREAM && listen(server, 64))) {
		perror("talk: bind");
		return 1;
	}
	printf("listening\n");
	fflush(stdout);
	for (;;) {
		struct sockaddr_storage from;
		socklen_t from_length = sizeof(from);
		char text[1024];
		int peer = type == SOCK_STREAM ? accept(server, NULL, NULL) : server;
		ssize_t got = recvfrom(peer, text, sizeof(text) - 1, 0, (struct sockaddr *)&from, &from_length);

		text[got > 0 ? got : 0] = 0;
		if (type == SOCK_DGRAM) {
			answer(peer, text, (struct sockaddr *)&from, from_length);
		} else {
			answer(peer, text, NULL, 0);
			close(peer);
		}
	}
}

static int ask(int type, const char *text)
{
	struct timeval patience = { .tv_sec = type == SOCK_DGRAM ? 1 : 5 };
	char answer[2048];
	ssize_t got = -1;

	for (int try = 0; try < 100 && got <= 0; try++) {
		int client = socket(address.ss_family, type, 0);

		setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
		if (!connect(client, (struct sockaddr *)&address, length) &&
		    send(client, text, strlen(text), MSG_NOSIGNAL) >= 0)
			got = recv(client, answer, sizeof(answer), 0);
		if (got <= 0 && try == 99)
			perror("talk");
		close(client);
		if (got <= 0)
			usleep(200000);
	}
	return got > 0 && write(1, answer, got) == got ? 0 : 1;
}

static int tell(int type, char **texts)
{
	int client = socket(address.ss_family, type, 0);

	if (connect(client, (struct sockaddr *)&address, length)) {
		perror("talk: connect");
		return 1;
	}
	for (; *texts; texts++) {
		if (send(client, *texts, strlen(*texts), MSG_NOSIGNAL) < 0) {
			perror("talk: send");
			return 1;
		}
	}
	return 0;
}

/* Sends all of it. */
static int put(int to, const char *data, ssize_t size)
{
	while (size > 0) {
		ssize_t sent = send(to, data, size, MSG_NOSIGNAL);

		if (sent < 0)
			return -1;
		data += sent;
		size -= sent;
	}
	return 0;
}

/* Sends MiB, or with none reads to the end and may send it back. */
static int measure(int type, long mib, int echo)
{
	static char data[1 << 18];
	int on = 1, client = socket(address.ss_family, type, 0);
	ssize_t got = 0;

	setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &on, sizeof(on));
	if (connect(client, (struct sockaddr *)&address, length)) {
		perror("talk: connect");
		return 1;
	}
	if (type == SOCK_DGRAM) {
		for (long left = mib << 20; left > 0; left -= PACKET)
			send(client, data, PACKET, 0);
		/* Where all are full of packets some get lost. */
		for (int last = 0; last < 20; last++) {
			usleep(20000);
			send(client, data, 0, 0);
		}
		return 0;
	}
	for (long left = mib << 20; left > 0 && got >= 0; left -= sizeof(data))
		got = put(client, data, sizeof(data));
	while (mib == 0 && got >= 0 && (got = recv(client, data, sizeof(data), 0)) > 0)
		if (echo)
			got = put(client, data, got);
	if (got < 0)
		perror("talk");
	return got < 0;
}

static long long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000LL + time.tv_nsec / 1000;
}

static int timed(int type)
{
	static char data[1 << 18];
	int on = 1, size = 4 << 20, server = socket(address.ss_family, type, 0), peer = server;
	long long bytes = 0, first = 0, last = 0;
	ssize_t got;

	setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	setsockopt(server, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size));
	if (bind(server, (struct sockaddr *)&address, length) || (type == SOCK_STREAM && listen(server, 1))) {
		perror("talk: bind");
		return 1;
	}
	printf("listening\n");
	fflush(stdout);
	if (type == SOCK_STREAM)
		peer = accept(server, NULL, NULL);
	while ((got = recv(peer, data, sizeof(data), 0)) > 0) {
		last = now();
		if (!first)
			first = last;
		bytes += got;
	}
	printf("%lld %lld\n", bytes, last - first);
	return 0;
}

static int rate(int type, int seconds)
{
	struct timeval patience = { .tv_sec = 1 };
	long long end = now() + seconds * 1000000LL;
	long answers = 0;
	char text[2048];

	while (now() < end) {
		int client = socket(address.ss_family, type, 0);

		setsockopt(client, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
		if (!connect(client, (struct sockaddr *)&address, length) && send(client, "hello", 5, MSG_NOSIGNAL) == 5 &&
		    recv(client, text, sizeof(text), 0) > 0)
			answers++;
		close(client);
	}
	printf("%ld\n", answers / seconds);
	return 0;
}

int main(int argc, char **argv)
{
	int type, used;

	signal(SIGTERM, SIG_DFL);
	used = argc > 3 ? parse(argv + 2, &type) : 0;
	if (used && argc == 2 + used && !strcmp(argv[1], "serve"))
		return serve(type);
	if (used && argc == 3 + used && !strcmp(argv[1], "ask"))
		return ask(type, argv[2 + used]);
	if (used && argc >= 3 + used && !strcmp(argv[1], "tell"))
		return tell(type, argv + 2 + used);
	if (used && argc == 3 + used && !strcmp(argv[1], "send"))
		return measure(type, atol(argv[2 + used]), 0);
	if (used && argc == 2 + used && (!strcmp(argv[1], "drain") || !strcmp(argv[1], "echo")))
		return measure(type, 0, argv[1][0] == 'e');
	if (used && argc == 2 + used && !strcmp(argv[1], "time"))
		return timed(type);
	if (used && argc == 3 + used && !strcmp(argv[1], "rate"))
		return rate(type, atoi(argv[2 + used]));
	fprintf(stderr, "usage: talk serve|ask|tell|send|drain|echo|time|rate tcp|udp|unix ADDRESS [PORT] [TEXT|MIB|SECONDS]\n");
	return 2;
}
