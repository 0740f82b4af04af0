/* Faults of a disk, for a program under test: preloaded (LD_PRELOAD), it stands between the program and the C library's file
 * functions, for files below one folder.
 *
 * FAULTS_ROOT     the folder (an absolute path without links)
 * FAULTS_CONTROL  a file of the numbers in `struct control`; a test changes them while the program runs
 * FAULTS_ASIDE    a folder on the same file system, outside of the root, for what may have to come back; with it there is a
 *                 journal, and death is a power failure
 *
 * Failing: the operations in `fail_ops` fail with `fail_errno` once `fail_after_bytes` more bytes have been written, for
 * `fail_times` operations (0: until the test lifts it). A write that crosses the border is cut short at it, as a full disk does.
 *
 * Dying: at the operation number `kill_at` the process ends as if by `kill -9`. With a journal the power fails: what was not
 * synced is undone first, under the lock that every operation takes:
 *   - each file is cut back to its length at its last fsync or fdatasync (a file that was there before, to its length when it
 *     was first opened for writing);
 *   - creations, renames, links and removals whose folder was not synced after them are undone, the last one first. A file
 *     that a rename replaced or that was removed is back.
 *
 * What this does not see: writes through memory maps, streams (fopen) and direct system calls; bytes overwritten in place, which stay
 * overwritten; a truncation that would be undone. Metadata is lost all at once from the last sync on, not in parts.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum op { WRITE = 1, SYNC = 2, RENAME = 4, CREATE = 8, RESIZE = 16, MKDIR = 32, REMOVE = 64 };

struct control {
    uint64_t fail_ops, fail_errno, fail_after_bytes, fail_times; /* set by the test */
    uint64_t kill_at;                                            /* set by the test; 0: never */
    uint64_t operations, bytes, failed;                          /* counted here */
};

/* A file that was written, by its inode. */
struct file {
    dev_t device;
    ino_t inode;
    off_t synced;
};

/* A change of names that no sync of its folder has followed. */
enum change { CREATED, RENAMED, REMOVED, MADE };
struct entry {
    enum change change;
    char *path, *from, *aside; /* from: the old name; aside: what the change replaced or removed */
};

static struct control nothing, *control = &nothing;
static char root[PATH_MAX], aside[PATH_MAX];
static size_t root_length;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct file *files;
static size_t file_count;
static struct entry *entries;
static size_t entry_count;
static unsigned long aside_count;

#define REAL(name) ((__typeof__(&name))real(#name))
static void *real(const char *name) { return dlsym(RTLD_NEXT, name); }

__attribute__((constructor)) static void begin(void) {
    const char *folder = getenv("FAULTS_ROOT"), *numbers = getenv("FAULTS_CONTROL"), *side = getenv("FAULTS_ASIDE");
    if (!folder || !numbers) return;
    snprintf(root, sizeof root, "%s", folder);
    root_length = strlen(root);
    if (side) snprintf(aside, sizeof aside, "%s", side);
    int fd = REAL(open)(numbers, O_RDWR | O_CLOEXEC);
    if (fd < 0) return;
    void *shared = mmap(0, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (shared != MAP_FAILED) control = shared;
    REAL(close)(fd);
}

static int is_inside(const char *path) {
    return root_length && !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

/* The absolute path of a name relative to an open folder; 0 where it is not below the root. */
static int inside_at(int folder, const char *name, char *out) {
    char base[PATH_MAX] = "";
    if (!root_length || !name) return 0;
    if (name[0] != '/') {
        char link[64];
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, base, sizeof base - 2);
        if (length < 0) return 0;
        base[length] = '/', base[length + 1] = 0;
    }
    if (snprintf(out, PATH_MAX, "%s%s", base, name) >= PATH_MAX) return 0;
    size_t length = strlen(out);
    while (length > 1 && out[length - 1] == '/') out[--length] = 0;
    return is_inside(out);
}

static int inside_fd(int fd, char *out) {
    char link[64];
    if (!root_length) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, out, PATH_MAX - 1);
    if (length < 0) return 0;
    out[length] = 0;
    return is_inside(out);
}

/* The journal. */

static struct file *file_of(const struct stat *found) {
    for (size_t i = file_count; i-- > 0;)
        if (files[i].inode == found->st_ino && files[i].device == found->st_dev) return &files[i];
    files = realloc(files, (file_count + 1) * sizeof *files);
    files[file_count] = (struct file){found->st_dev, found->st_ino, found->st_size};
    return &files[file_count++];
}

static void note(enum change change, const char *path, const char *from, char *replaced) {
    if (!aside[0]) return;
    entries = realloc(entries, (entry_count + 1) * sizeof *entries);
    entries[entry_count++] = (struct entry){change, strdup(path), from ? strdup(from) : 0, replaced};
}

/* Another name for a file that is about to lose its own; 0 where there is none. */
static char *keep(const char *path) {
    struct stat found;
    char name[PATH_MAX + 32];
    if (!aside[0] || lstat(path, &found) || !S_ISREG(found.st_mode)) return 0;
    snprintf(name, sizeof name, "%s/%d-%lu", aside, getpid(), aside_count++);
    return REAL(link)(path, name) ? 0 : strdup(name);
}

static int is_in(const char *path, const char *folder) {
    size_t length = strlen(folder);
    return !strncmp(path, folder, length) && path[length] == '/' && !strchr(path + length + 1, '/');
}

static void forget(struct entry *entry) {
    if (entry->aside) REAL(unlink)(entry->aside);
    free(entry->path), free(entry->from), free(entry->aside);
}

/* A folder was synced: its names are as they are. */
static void settle(const char *folder) {
    size_t kept = 0;
    for (size_t i = 0; i < entry_count; i++) {
        if (is_in(entries[i].path, folder)) forget(&entries[i]);
        else entries[kept++] = entries[i];
    }
    entry_count = kept;
}

static int remove_one(const char *path, const struct stat *found, int kind, struct FTW *walk) {
    (void)found, (void)kind, (void)walk;
    return remove(path);
}

static void undo(const struct entry *entry) {
    switch (entry->change) {
    case CREATED: REAL(unlink)(entry->path); break;
    case MADE: nftw(entry->path, remove_one, 16, FTW_DEPTH | FTW_PHYS); break;
    case RENAMED:
        REAL(rename)(entry->path, entry->from);
        if (entry->aside) REAL(rename)(entry->aside, entry->path);
        break;
    case REMOVED: REAL(rename)(entry->aside, entry->path);
    }
}

static int cut_one(const char *path, const struct stat *found, int kind, struct FTW *walk) {
    (void)walk;
    if (kind != FTW_F) return 0;
    for (size_t i = file_count; i-- > 0;)
        if (files[i].inode == found->st_ino && files[i].device == found->st_dev) {
            if (found->st_size > files[i].synced && REAL(truncate)(path, files[i].synced)) abort();
            break;
        }
    return 0;
}

static void die(void) {
    if (aside[0]) {
        while (entry_count) undo(&entries[--entry_count]);
        nftw(root, cut_one, 16, FTW_PHYS);
    }
    kill(getpid(), SIGKILL);
    for (;;) pause();
}

/* Counts an operation; the error that it fails with, or 0. `bytes`: what it wants to write, lowered to what there is room for. */
static int enter(enum op op, size_t *bytes) {
    pthread_mutex_lock(&lock);
    if (++control->operations == control->kill_at) die();
    if (control->fail_errno && (control->fail_ops & op)) {
        uint64_t room = control->fail_after_bytes;
        if (bytes && *bytes && room) {
            if (*bytes > room) *bytes = room;
            control->fail_after_bytes -= *bytes;
        } else if (!room) {
            int error = (int)control->fail_errno;
            control->failed++;
            if (control->fail_times && !--control->fail_times) control->fail_errno = 0;
            pthread_mutex_unlock(&lock);
            return error;
        }
    }
    if (bytes) control->bytes += *bytes;
    return 0;
}

#define ENTER(op, bytes, failure)                                                                                              \
    do {                                                                                                                       \
        int error = enter(op, bytes);                                                                                          \
        if (error) { errno = error; return failure; }                                                                          \
    } while (0)

#define LEAVE(result)                                                                                                          \
    do {                                                                                                                       \
        int saved = errno;                                                                                                     \
        pthread_mutex_unlock(&lock);                                                                                           \
        errno = saved;                                                                                                         \
        return result;                                                                                                         \
    } while (0)

/* Files. */

static int open_file(int folder, const char *name, int flags, mode_t mode) {
    char path[PATH_MAX];
    int writes = (flags & O_ACCMODE) != O_RDONLY || (flags & (O_CREAT | O_TRUNC));
    if (!writes || !inside_at(folder, name, path)) return REAL(openat)(folder, name, flags, mode);
    struct stat found;
    int creates = (flags & O_CREAT) && lstat(path, &found);
    if (creates) ENTER(CREATE, 0, -1);
    else pthread_mutex_lock(&lock);
    int fd = REAL(openat)(folder, name, flags, mode);
    if (fd >= 0 && !fstat(fd, &found) && S_ISREG(found.st_mode)) {
        struct file *file = file_of(&found);
        /* The inode may have been another file's. */
        if (creates || (flags & O_TRUNC)) file->synced = 0;
        if (creates) note(CREATED, path, 0, 0);
    }
    LEAVE(fd);
}

#define MODE                                                                                                                   \
    mode_t mode = 0;                                                                                                           \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                                                                     \
        va_list more;                                                                                                          \
        va_start(more, flags);                                                                                                 \
        mode = va_arg(more, mode_t);                                                                                           \
        va_end(more);                                                                                                          \
    }

int open(const char *name, int flags, ...) { MODE return open_file(AT_FDCWD, name, flags, mode); }
int open64(const char *name, int flags, ...) { MODE return open_file(AT_FDCWD, name, flags | O_LARGEFILE, mode); }
int openat(int folder, const char *name, int flags, ...) { MODE return openat64(folder, name, flags, mode); }
int openat64(int folder, const char *name, int flags, ...) { MODE return open_file(folder, name, flags, mode); }
int creat(const char *name, mode_t mode) { return open_file(AT_FDCWD, name, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *name, mode_t mode) { return creat(name, mode); }

#define WRITES(name, parameters, count, call)                                                                                  \
    ssize_t name parameters {                                                                                                  \
        char path[PATH_MAX];                                                                                                   \
        size_t bytes = count;                                                                                                  \
        if (!inside_fd(fd, path)) return REAL(name) call;                                                                      \
        ENTER(WRITE, &bytes, -1);                                                                                              \
        ssize_t written = REAL(name) call;                                                                                     \
        LEAVE(written);                                                                                                        \
    }

WRITES(write, (int fd, const void *data, size_t length), length, (fd, data, bytes))
WRITES(pwrite, (int fd, const void *data, size_t length, off_t at), length, (fd, data, bytes, at))
WRITES(pwrite64, (int fd, const void *data, size_t length, off64_t at), length, (fd, data, bytes, at))

static size_t total(const struct iovec *parts, int count) {
    size_t bytes = 0;
    while (count-- > 0) bytes += parts[count].iov_len;
    return bytes;
}

/* One that is cut short is cut to its first part. */
WRITES(writev, (int fd, const struct iovec *parts, int count), total(parts, count),
       (fd, parts, bytes < total(parts, count) ? 1 : count))
WRITES(pwritev, (int fd, const struct iovec *parts, int count, off_t at), total(parts, count),
       (fd, parts, bytes < total(parts, count) ? 1 : count, at))
WRITES(pwritev64, (int fd, const struct iovec *parts, int count, off64_t at), total(parts, count),
       (fd, parts, bytes < total(parts, count) ? 1 : count, at))
WRITES(copy_file_range, (int from, off64_t *at, int fd, off64_t *to, size_t length, unsigned flags), length,
       (from, at, fd, to, bytes, flags))

static int resized(int fd) {
    struct stat found;
    if (!fstat(fd, &found)) {
        struct file *file = file_of(&found);
        if (file->synced > found.st_size) file->synced = found.st_size;
    }
    return 0;
}

#define RESIZES(name, parameters, call)                                                                                        \
    int name parameters {                                                                                                      \
        char path[PATH_MAX];                                                                                                   \
        if (!inside_fd(fd, path)) return REAL(name) call;                                                                      \
        ENTER(RESIZE, 0, -1);                                                                                                  \
        int result = REAL(name) call;                                                                                          \
        resized(fd);                                                                                                           \
        LEAVE(result);                                                                                                         \
    }

RESIZES(ftruncate, (int fd, off_t length), (fd, length))
RESIZES(ftruncate64, (int fd, off64_t length), (fd, length))
RESIZES(fallocate, (int fd, int mode, off_t at, off_t length), (fd, mode, at, length))
RESIZES(fallocate64, (int fd, int mode, off64_t at, off64_t length), (fd, mode, at, length))
RESIZES(posix_fallocate, (int fd, off_t at, off_t length), (fd, at, length))

#define SYNCS(name)                                                                                                            \
    int name(int fd) {                                                                                                         \
        char path[PATH_MAX];                                                                                                   \
        struct stat found;                                                                                                     \
        if (!inside_fd(fd, path)) return REAL(name)(fd);                                                                       \
        ENTER(SYNC, 0, -1);                                                                                                    \
        int result = REAL(name)(fd);                                                                                           \
        if (!result && !fstat(fd, &found)) {                                                                                   \
            if (S_ISDIR(found.st_mode)) settle(path);                                                                          \
            else if (S_ISREG(found.st_mode)) file_of(&found)->synced = found.st_size;                                          \
        }                                                                                                                      \
        LEAVE(result);                                                                                                         \
    }

SYNCS(fsync)
SYNCS(fdatasync)

/* Names. */

static int rename_file(int old_folder, const char *old, int new_folder, const char *new, unsigned flags) {
    char from[PATH_MAX], to[PATH_MAX];
    int inside = inside_at(new_folder, new, to) & inside_at(old_folder, old, from);
    if (!inside) return REAL(renameat2)(old_folder, old, new_folder, new, flags);
    ENTER(RENAME, 0, -1);
    char *replaced = keep(to);
    int result = REAL(renameat2)(old_folder, old, new_folder, new, flags);
    if (!result) note(RENAMED, to, from, replaced);
    else if (replaced) REAL(unlink)(replaced), free(replaced);
    LEAVE(result);
}

int rename(const char *old, const char *new) { return rename_file(AT_FDCWD, old, AT_FDCWD, new, 0); }
int renameat(int a, const char *old, int b, const char *new) { return rename_file(a, old, b, new, 0); }
int renameat2(int a, const char *old, int b, const char *new, unsigned flags) { return rename_file(a, old, b, new, flags); }

int linkat(int a, const char *old, int b, const char *new, int flags) {
    char path[PATH_MAX];
    if (!inside_at(b, new, path)) return REAL(linkat)(a, old, b, new, flags);
    ENTER(CREATE, 0, -1);
    int result = REAL(linkat)(a, old, b, new, flags);
    if (!result) note(CREATED, path, 0, 0);
    LEAVE(result);
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

int unlinkat(int folder, const char *name, int flags) {
    char path[PATH_MAX];
    if (!inside_at(folder, name, path)) return REAL(unlinkat)(folder, name, flags);
    ENTER(REMOVE, 0, -1);
    char *kept = flags & AT_REMOVEDIR ? 0 : keep(path);
    int result = REAL(unlinkat)(folder, name, flags);
    if (!result && kept) note(REMOVED, path, 0, kept);
    else if (kept) REAL(unlink)(kept), free(kept);
    LEAVE(result);
}
int unlink(const char *name) { return unlinkat(AT_FDCWD, name, 0); }
int rmdir(const char *name) { return unlinkat(AT_FDCWD, name, AT_REMOVEDIR); }

int mkdirat(int folder, const char *name, mode_t mode) {
    char path[PATH_MAX];
    struct stat found;
    /* One that is there needs nothing of the disk, and is there for whoever wants it. */
    if (!inside_at(folder, name, path) || !lstat(path, &found)) return REAL(mkdirat)(folder, name, mode);
    ENTER(MKDIR, 0, -1);
    int result = REAL(mkdirat)(folder, name, mode);
    if (!result) note(MADE, path, 0, 0);
    LEAVE(result);
}
int mkdir(const char *name, mode_t mode) { return mkdirat(AT_FDCWD, name, mode); }
