/* What a file system does.
 *
 *   files acl access|default PATH UID    gives a user an entry of an ACL: read, or read and search
 *   files set PATH NAME VALUE            an extended attribute
 *   files get PATH NAME
 *   files list PATH                      their names
 *   files capability PATH                lets a program open raw sockets
 *   files taken DIR                      tries in all ways to make the name "taken" there
 *   files probe DIR                      one line for each of many calls; DIR must be empty
 *   files times DIR COUNT                microseconds of each small operation, medians
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

static char text[8192];

/* Prints what a call gave: its value, or the name of its error. */
static void say(const char *what, long value)
{
	printf("%s %s\n", what, value < 0 ? strerrorname_np(errno) : "ok");
}

#define TRY(call) (errno = 0, say(#call, (long)(call)))

static void number(const char *what, long long value)
{
	printf("%s %lld\n", what, value);
}

static int acl(const char *kind, const char *path, unsigned user)
{
	const uint16_t rights = strcmp(kind, "default") ? 4 : 5;
	const struct { uint16_t tag, rights; uint32_t id; } entries[] = {
		{ 0x01, rights | 2, -1 },	/* the owner */
		{ 0x02, rights, user },
		{ 0x04, 0, -1 },		/* the group */
		{ 0x10, rights, -1 },		/* the mask */
		{ 0x20, 0, -1 },		/* others */
	};
	const uint32_t version = 2;
	char name[64];

	memcpy(text, &version, sizeof(version));
	memcpy(text + sizeof(version), entries, sizeof(entries));
	snprintf(name, sizeof(name), "system.posix_acl_%s", kind);
	say("acl", setxattr(path, name, text, sizeof(version) + sizeof(entries), 0));
	return 0;
}

static int list(const char *path)
{
	ssize_t size = listxattr(path, text, sizeof(text));

	for (char *name = text; name < text + size; name += strlen(name) + 1)
		puts(name);
	return size < 0;
}

static int capability(const char *path)
{
	const struct vfs_cap_data data = {
		.magic_etc = VFS_CAP_REVISION_2 | VFS_CAP_FLAGS_EFFECTIVE,
		.data[0].permitted = 1 << CAP_NET_RAW,
	};

	say("capability", setxattr(path, "security.capability", &data, sizeof(data), 0));
	return 0;
}

static int taken(const char *dir)
{
	struct sockaddr_un address = { AF_UNIX, "taken" };

	if (chdir(dir))
		return 1;
	TRY(open("taken", O_CREAT | O_EXCL | O_WRONLY, 0600));
	TRY(mkdir("taken", 0700));
	TRY(symlink("to", "taken"));
	TRY(link("taken", "taken"));
	TRY(mknod("taken", S_IFREG | 0600, 0));
	TRY(mkfifo("taken", 0600));
	TRY(bind(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&address, sizeof(address)));
	return 0;
}

static int make(const char *name)
{
	return open(name, O_CREAT | O_RDWR, 0644);
}

static struct stat status(const char *name)
{
	struct stat found = { 0 };

	if (lstat(name, &found))
		found.st_nlink = -1;
	return found;
}

static void probe_data(void)
{
	const long hole = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
	int file = make("data"), other = make("other");
	char *memory;
	void *aligned = NULL;

	TRY(ftruncate(file, 1 << 20));
	TRY(pwrite(file, "x", 1, 1 << 19));
	number("data at", lseek(file, 0, SEEK_DATA));
	number("hole at", lseek(file, 1 << 19, SEEK_HOLE) - (1 << 19));
	TRY(fallocate(file, 0, 0, 1 << 20));
	TRY(fallocate(file, hole, 0, 1 << 18));
	TRY(fallocate(file, FALLOC_FL_ZERO_RANGE, 0, 4096));
	TRY(fallocate(file, FALLOC_FL_KEEP_SIZE, 1 << 20, 1 << 20));
	TRY(fallocate(file, FALLOC_FL_COLLAPSE_RANGE, 0, 4096));
	TRY(ftruncate(file, 8192));
	memory = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
	memory[5] = 'Q';
	TRY(pread(file, text, 1, 5));
	number("a read sees a mapping's write", text[0] == 'Q');
	TRY(pwrite(file, "Z", 1, 6));
	number("a mapping sees a write", memory[6] == 'Z');
	TRY(msync(memory, 8192, MS_SYNC));
	TRY(copy_file_range(file, &(off_t){ 0 }, other, &(off_t){ 0 }, 8192, 0));
	TRY(sendfile(other, file, &(off_t){ 0 }, 100));
	TRY(fsync(other));
	TRY(fdatasync(other));
	TRY(syncfs(other));
	TRY(ioctl(other, FICLONE, file));
	TRY(ioctl(other, FS_IOC_GETFLAGS, &(int){ 0 }));
	TRY(flock(file, LOCK_EX | LOCK_NB));
	TRY(fcntl(file, F_OFD_SETLK, &(struct flock){ .l_type = F_WRLCK, .l_len = 9 }));
	TRY(fcntl(open("data", O_RDWR), F_OFD_SETLK, &(struct flock){ .l_type = F_WRLCK, .l_len = 9 }));
	TRY(fcntl(other, F_SETLEASE, F_UNLCK));
	TRY(posix_memalign(&aligned, 4096, 4096));
	TRY(write(open("data", O_RDWR | O_DIRECT), aligned, 4096));
	TRY(pwrite(open("data", O_RDWR | O_APPEND), "x", 1, 0));
	number("size", status("data").st_size);
}

static void probe_names(void)
{
	struct sockaddr_un address = { AF_UNIX, "socket" };
	int directory = open(".", O_RDONLY | O_DIRECTORY), file = make("name");
	int server = socket(AF_UNIX, SOCK_STREAM, 0), wrong = 0;
	struct dirent *entry;
	DIR *dir;

	TRY(link("name", "hard"));
	number("links", status("name").st_nlink);
	number("one inode", status("name").st_ino == status("hard").st_ino);
	TRY(unlink("name"));
	TRY(unlink("hard"));
	TRY(pwrite(file, "still", 5, 0));
	TRY(fchmod(file, 0600));
	TRY(make("file"));
	TRY(symlink("file", "symlink"));
	TRY(open("symlink", O_RDONLY | O_NOFOLLOW));
	TRY(open("file", O_RDONLY | O_DIRECTORY));
	TRY(open("file/", O_RDONLY));
	TRY(mkdir("one", 0755));
	TRY(mkdir("two", 0755));
	TRY(make("two/full"));
	TRY(rename("one", "two"));
	TRY(rename("one", "file"));
	TRY(rename("file", "one"));
	TRY(rename("two", "two/below"));
	TRY(renameat2(directory, "one", directory, "file", RENAME_NOREPLACE));
	TRY(renameat2(directory, "one", directory, "file", RENAME_EXCHANGE));
	TRY(renameat2(directory, "one", directory, "moved", RENAME_WHITEOUT));
	TRY(rmdir("two"));
	TRY(unlink("two"));
	TRY(mkfifo("fifo", 0622));
	number("mode of a fifo", status("fifo").st_mode & 0777);
	TRY(open("fifo", O_RDWR | O_NONBLOCK));
	TRY(bind(server, (void *)&address, sizeof(address)));
	TRY(listen(server, 1));
	TRY(connect(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&address, sizeof(address)));
	TRY(open(".", O_TMPFILE | O_RDWR, 0600));
	memset(text, 'n', 256);
	text[256] = 0;
	TRY(make(text));
	text[255] = 0;
	TRY(make(text));
	TRY(make("\xff\xfe \n\\"));
	TRY(fsync(directory));
	TRY(flock(directory, LOCK_EX | LOCK_NB));
	dir = opendir(".");
	while (dir && (entry = readdir(dir)))
		wrong += entry->d_type != IFTODT(status(entry->d_name).st_mode);
	number("wrong types", wrong);
}

static void probe_attributes(void)
{
	const struct timespec times[] = { { -5, 123456789 }, { 0, UTIME_OMIT } };
	int file = make("attributes");
	struct statx statx_found;

	TRY(utimensat(AT_FDCWD, "attributes", times, 0));
	number("before 1970", status("attributes").st_atim.tv_sec);
	number("nanoseconds", status("attributes").st_atim.tv_nsec);
	memset(&statx_found, 0, sizeof(statx_found));
	TRY(statx(AT_FDCWD, "attributes", 0, STATX_BTIME, &statx_found));
	number("time of birth", !!(statx_found.stx_mask & STATX_BTIME));
	TRY(fchmod(file, 04755));
	TRY(fchown(file, 1, 1));
	number("setuid after chown", !!(status("attributes").st_mode & S_ISUID));
	TRY(mkdir("group", 0777));
	TRY(chown("group", 0, 77));
	TRY(chmod("group", 02775));
	TRY(make("group/file"));
	TRY(mkdir("group/below", 0755));
	number("inherited group", status("group/file").st_gid);
	number("setgid of a directory", !!(status("group/below").st_mode & S_ISGID));
	TRY(fsetxattr(file, "user.one", "value", 5, 0));
	TRY(fsetxattr(file, "user.one", "value", 5, XATTR_CREATE));
	TRY(fgetxattr(file, "user.one", text, 9));
	TRY(fgetxattr(file, "user.none", text, 9));
	memset(text, 'x', 3000);
	TRY(fsetxattr(file, "user.large", text, 3000, 0));
	TRY(fsetxattr(file, "trusted.one", "value", 5, 0));
	TRY(fgetxattr(file, "trusted.one", text, 9));
	TRY(fsetxattr(file, "security.one", "value", 5, 0));
	TRY(symlink("attributes", "link"));
	TRY(lsetxattr("link", "user.one", "value", 5, 0));
	TRY(mknod("null", S_IFCHR | 0666, makedev(1, 3)));
	TRY(open("null", O_WRONLY));
	umask(077);
	TRY(make("masked"));
	number("mode", status("masked").st_mode & 0777);
}

#define ROUNDS 5

static double now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

static int ascending(const void *a, const void *b)
{
	return (*(double *)a > *(double *)b) - (*(double *)a < *(double *)b);
}

static const char *name(const char *kind, int which)
{
	static char names[2][64];
	static int turn;

	turn = !turn;
	snprintf(names[turn], sizeof(names[turn]), "%s-%d", kind, which);
	return names[turn];
}

static int failed;

static void check(int good)
{
	if (!good) {
		perror("files times");
		failed = 1;
	}
}

static void write_and_close(int file)
{
	check(write(file, "text", 4) == 4 && !close(file));
}

static int times(const char *dir, int count)
{
	enum { CREATE, EXCLUSIVE, REWRITE, READ, PWRITE, STAT, ABSENT, MKDIR, RENAME, UNLINK, KINDS };
	static const char *const kinds[] = { "create", "exclusive", "rewrite", "read", "pwrite",
					     "stat", "absent", "mkdir", "rename", "unlink" };
	static double took[KINDS][ROUNDS];
	double began;
	int file;

	if (chdir(dir))
		return 1;
#define TIME(kind, ...)                                                                        \
	began = now();                                                                         \
	for (int i = 0; i < count; i++) {                                                      \
		__VA_ARGS__;                                                                   \
	}                                                                                      \
	took[kind][round] = (now() - began) / count

	for (int round = 0; round < ROUNDS; round++) {
		TIME(CREATE, write_and_close(open(name("file", i), O_CREAT | O_WRONLY, 0644)));
		TIME(EXCLUSIVE, write_and_close(
			open(name("new", i), O_CREAT | O_EXCL | O_WRONLY, 0644)));
		TIME(REWRITE, write_and_close(open(name("file", i), O_TRUNC | O_WRONLY)));
		TIME(READ, file = open("file-0", O_RDONLY);
		     check(read(file, text, 9) == 4 && !close(file)));
		file = open("file-0", O_RDWR);
		TIME(PWRITE, check(pwrite(file, text, 4096, 0) == 4096));
		check(!ftruncate(file, 4) && !close(file));
		TIME(STAT, check(status("file-0").st_nlink == 1));
		TIME(ABSENT, check(access("absent", F_OK) < 0));
		TIME(MKDIR, check(!mkdir(name("dir", i), 0755)));
		TIME(RENAME, check(!rename(name("file", i), name("new", i))));
		TIME(UNLINK, check(!unlink(name("new", i))));
		for (int i = 0; i < count; i++)
			check(!rmdir(name("dir", i)));
	}
	for (int kind = 0; kind < KINDS; kind++) {
		qsort(took[kind], ROUNDS, sizeof(double), ascending);
		printf("%s %.1f\n", kinds[kind], took[kind][ROUNDS / 2]);
	}
	return failed;
}

/* Once it is told to, begins more reads of its file than are sent at once, and ends. */
static int ahead(const char *path, const char *ready)
{
	int file = open(path, O_RDONLY);

	posix_fadvise(file, 0, 0, POSIX_FADV_DONTNEED);
	/* Its own code is not read later. */
	if (mlockall(MCL_CURRENT))
		return 1;
	close(open(ready, O_CREAT | O_WRONLY, 0644));
	if (file < 0 || read(0, text, 1) != 1)
		return 1;
	for (off_t i = 0; i < 32; i++)
		readahead(file, i << 20, 1 << 17);
	_exit(7);
}

int main(int count, char **words)
{
	const char *what = count > 2 ? words[1] : "";

	umask(022);
	if (!strcmp(what, "acl") && count == 5)
		return acl(words[2], words[3], atoi(words[4]));
	if (!strcmp(what, "set") && count == 5)
		return say("set", setxattr(words[2], words[3], words[4], strlen(words[4]), 0)), 0;
	if (!strcmp(what, "get") && count == 4) {
		ssize_t size = getxattr(words[2], words[3], text, sizeof(text) - 1);

		puts(size < 0 ? strerrorname_np(errno) : text);
		return 0;
	}
	if (!strcmp(what, "list"))
		return list(words[2]);
	if (!strcmp(what, "capability"))
		return capability(words[2]);
	if (!strcmp(what, "taken"))
		return taken(words[2]);
	if (!strcmp(what, "ahead") && count == 4)
		return ahead(words[2], words[3]);
	if (!strcmp(what, "times") && count == 4)
		return times(words[2], atoi(words[3]));
	if (!strcmp(what, "probe") && !chdir(words[2])) {
		probe_data();
		probe_names();
		probe_attributes();
		return 0;
	}
	return 2;
}
