/*
 * Prints what happens to names in a directory, a line each, until it is killed:
 *   inotify DIRECTORY
 */
#include <stdio.h>
#include <sys/inotify.h>
#include <unistd.h>

int main(int argc, char **argv)
{
	static char buffer[8192] __attribute__((aligned(__alignof__(struct inotify_event))));
	int watch = inotify_init();
	ssize_t got, at;

	if (argc != 2 || inotify_add_watch(watch, argv[1], IN_CREATE | IN_DELETE | IN_MOVED_TO) < 0)
		return 1;
	puts("watching");
	fflush(stdout);
	while ((got = read(watch, buffer, sizeof(buffer))) > 0) {
		for (at = 0; at < got;) {
			struct inotify_event *event = (struct inotify_event *)(buffer + at);

			printf("%s %s\n", event->mask & IN_CREATE ? "made" :
			       event->mask & IN_DELETE ? "removed" : "moved", event->name);
			at += sizeof(*event) + event->len;
		}
		fflush(stdout);
	}
	return 1;
}
