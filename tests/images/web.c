/*
 * A web server in the place of nginx and httpd: answers every request on the port that
 * its first argument names. critest looks for nginx's pid file, for "master process"
 * in the command line (the image gives it as the second argument) and for httpd's
 * name in the log.
 */
#include <arpa/inet.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static const char answer[] =
	"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 6\r\n"
	"Connection: close\r\n\r\nhello\n";

static void end(int signal)
{
	(void)signal;
	_exit(0);
}

/* Reads up to the empty line that ends a request's head. */
static int read_head(int connection)
{
	char head[8192];
	size_t length = 0;

	while (length < sizeof(head) - 1) {
		ssize_t got = read(connection, head + length, sizeof(head) - 1 - length);

		if (got <= 0)
			return 0;
		length += got;
		head[length] = 0;
		if (strstr(head, "\r\n\r\n"))
			return 1;
	}
	return 0;
}

static void write_pid(const char *program)
{
	char path[64];
	FILE *file;

	snprintf(path, sizeof(path), "/var/run/%s.pid", program);
	file = fopen(path, "w");
	if (file) {
		fprintf(file, "%d\n", getpid());
		fclose(file);
	}
}

int main(int argc, char **argv)
{
	const char *slash = strrchr(argv[0], '/');
	const char *program = slash ? slash + 1 : argv[0];
	struct sockaddr_in address = { .sin_family = AF_INET };
	struct timeval patience = { .tv_sec = 10 };
	int on = 1;
	int server = socket(AF_INET, SOCK_STREAM, 0);

	if (argc < 2)
		return 2;
	address.sin_port = htons(atoi(argv[1]));
	setsockopt(server, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(server, (struct sockaddr *)&address, sizeof(address)) || listen(server, 16)) {
		perror(program);
		return 1;
	}
	signal(SIGTERM, end);
	signal(SIGPIPE, SIG_IGN);
	write_pid(program);
	printf("%s: listening on port %s\n", program, argv[1]);
	fflush(stdout);
	for (;;) {
		int connection = accept(server, NULL, NULL);

		if (connection < 0)
			continue;
		setsockopt(connection, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
		if (read_head(connection) && write(connection, answer, sizeof(answer) - 1) < 0)
			perror(program);
		close(connection);
	}
}
