/* PAGES pages of code, each of which returns SALT and its own number. Says how many return
 * something else: an emulator does that which runs translations of what is no longer there.
 *
 *   code [ROUNDS]     calls the pages
 *   code write FILE   writes them into a file
 *   code read FILE... reads each such file past the page cache to one place, calls what is there
 *   code copy         calls a copy of them in memory of its own
 *   code until FILE   calls the pages until there is such a file
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define TEXT(number) #number
#define ASM(pages, salt)                                                                       \
	".text\n.balign 4096\n.globl code\ncode:\n.set page, 0\n.rept " TEXT(pages)            \
	"\nmovl $" TEXT(salt) " + page, %eax\nret\n.balign 4096\n.set page, page + 1\n.endr\n"
#define SIZE (PAGES * 4096L)

asm(ASM(PAGES, SALT));
extern char code[];

/* How many pages return other numbers than those from that of the first one on. */
static int wrong(char *pages, int first)
{
	int count = 0;

	for (int page = 0; page < PAGES; page++)
		count += ((int (*)(void))(pages + page * 4096L))() != first + page;
	return count;
}

/* In huge pages, where there are some. */
static char *memory(int protection)
{
	char *start = mmap(NULL, SIZE, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	madvise(start, SIZE, MADV_HUGEPAGE);
	return start;
}

static int whole(ssize_t done, const char *what)
{
	if (done == SIZE)
		return 0;
	perror(what);
	return 1;
}

int main(int argc, char **argv)
{
	const char *verb = argc > 1 ? argv[1] : "1";
	int count = 0;

	if (!strcmp(verb, "write"))
		return whole(write(open(argv[2], O_WRONLY | O_CREAT | O_TRUNC, 0644), code, SIZE), argv[2]);
	if (!strcmp(verb, "read")) {
		char *place = memory(PROT_READ | PROT_WRITE | PROT_EXEC);

		for (int file = 2; file < argc; file++) {
			int first;

			if (whole(read(open(argv[file], O_RDONLY | O_DIRECT), place, SIZE), argv[file]))
				return 2;
			/* The number in the first instruction. */
			memcpy(&first, place + 1, sizeof(first));
			count += wrong(place, first);
		}
	} else if (!strcmp(verb, "copy")) {
		char *copy = memcpy(memory(PROT_READ | PROT_WRITE), code, SIZE);

		mprotect(copy, SIZE, PROT_READ | PROT_EXEC);
		count = wrong(copy, SALT);
	} else if (!strcmp(verb, "until")) {
		do
			count += wrong(code, SALT);
		while (access(argv[2], F_OK));
	} else {
		for (int rounds = atoi(verb); rounds > 0; rounds--)
			count += wrong(code, SALT);
	}
	printf("%d of %d wrong\n", count, SALT);
	return !!count;
}
