/*
 * Library preloaded into the criu of a dump: some files in memory look sparser than they are.
 *
 * CRIU writes shared memory page by page, by one thread, and has no option to leave memory out. But it asks for each
 * file's data and holes (criu/shmem.c), and writes the data only. Here these two questions are answered for the files
 * of a list, and by the kernel for all others.
 *
 * The list is a file of words, in this machine's order: the number of files; for each its device, its inode, the
 * number of its pieces of data, and the begin and end of each, ascending, in bytes (shim/criu/src/sparse.rs).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static const uint64_t *words;
static uint64_t count;

__attribute__((constructor)) static void load(void)
{
	const char *path = getenv("GPUSNAP_SPARSE");
	struct stat list;
	int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;

	/* Programs that criu runs need none of it. */
	unsetenv("GPUSNAP_SPARSE");
	unsetenv("LD_PRELOAD");
	if (fd < 0)
		return;
	if (!fstat(fd, &list) && list.st_size >= 8) {
		void *map = mmap(NULL, list.st_size, PROT_READ, MAP_PRIVATE, fd, 0);

		if (map != MAP_FAILED) {
			words = map;
			count = list.st_size / sizeof(*words);
		}
	}
	close(fd);
}

/* Returns the pieces of a file, and their number; NULL if it is not on the list. */
static const uint64_t *find(const struct stat *file, uint64_t *pieces)
{
	uint64_t at = 1, files = count ? words[0] : 0;

	for (; files && count - at >= 3; files--) {
		uint64_t room = (count - at - 3) / 2;

		*pieces = words[at + 2];
		if (*pieces > room)
			return NULL;
		if (words[at] == file->st_dev && words[at + 1] == file->st_ino)
			return words + at + 3;
		at += 3 + 2 * *pieces;
	}
	return NULL;
}

off64_t lseek64(int fd, off64_t offset, int whence)
{
	struct stat file;
	const uint64_t *piece;
	uint64_t pieces, low = 0, high;

	if ((whence != SEEK_DATA && whence != SEEK_HOLE) || !words || offset < 0 || fstat(fd, &file) ||
	    offset >= file.st_size || !(piece = find(&file, &pieces)))
		return syscall(SYS_lseek, fd, offset, whence);
	/* The first piece that ends behind the offset. */
	for (high = pieces; low < high;) {
		uint64_t middle = low + (high - low) / 2;

		if (piece[2 * middle + 1] <= (uint64_t)offset)
			low = middle + 1;
		else
			high = middle;
	}
	if (low < pieces && piece[2 * low] <= (uint64_t)offset) {
		if (whence == SEEK_DATA)
			return offset;
		return piece[2 * low + 1] < (uint64_t)file.st_size ? (off64_t)piece[2 * low + 1] : file.st_size;
	}
	if (whence == SEEK_HOLE)
		return offset;
	if (low < pieces)
		return piece[2 * low];
	errno = ENXIO;
	return -1;
}

off64_t lseek(int fd, off64_t offset, int whence)
{
	return lseek64(fd, offset, whence);
}
