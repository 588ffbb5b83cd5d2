/* Tries one thing that a kernel limits, and says how far it got: limits WHAT [NUMBER]. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096

static void *nap(void *unused)
{
	pause();
	return unused;
}

static long threads(long wanted)
{
	pthread_attr_t attributes;
	pthread_t thread;
	long made = 0;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 16384);
	while (made < wanted && pthread_create(&thread, &attributes, nap, NULL) == 0)
		made++;
	return made;
}

static long files(long wanted)
{
	long made = 0;

	while (made < wanted && open("/dev/null", O_RDONLY) >= 0)
		made++;
	return made;
}

/* Every second page with other rights is a mapping of its own, and so are those between. */
static long mappings(long wanted)
{
	char *pages = mmap(NULL, wanted * PAGE, PROT_NONE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	long made = 0;

	while (pages != MAP_FAILED && made < wanted && mprotect(pages + made * PAGE, PAGE, PROT_READ) == 0)
		made += 2;
	return made;
}

/* Memory in MiB that was written to. */
static long memory(long wanted)
{
	long made = 0;
	char *mib;

	while (made < wanted && (mib = malloc(1 << 20)) != NULL) {
		memset(mib, 1, 1 << 20);
		made++;
	}
	return made;
}

int main(int count, char **arguments)
{
	const char *what = count > 1 ? arguments[1] : "";
	long number = count > 2 ? atol(arguments[2]) : 0;

	if (strcmp(what, "threads") == 0)
		printf("%ld threads\n", threads(number));
	else if (strcmp(what, "files") == 0)
		printf("%ld files\n", files(number));
	else if (strcmp(what, "mappings") == 0)
		printf("%ld mappings\n", mappings(number));
	else if (strcmp(what, "memory") == 0)
		printf("%ld MiB\n", memory(number));
	else if (strcmp(what, "call") == 0)
		printf("call %ld: %s\n", number, syscall(number, -1, 0, 0, 0, 0, 0) < 0 ? strerror(errno) : "done");
	else if (strcmp(what, "ioprio") == 0)
		printf("I/O priority %#lx\n", syscall(SYS_ioprio_get, 1, 0));
	else if (strcmp(what, "abort") == 0)
		abort();
	else
		return 2;
	fflush(stdout);
	/* The threads are still there. */
	_exit(0);
}
