// Makes some writes to files below FAULTS_BELOW fail or wait, for python -m benchmarks.faults: LD_PRELOAD=faults.so.
// FAULTS_FIRST and FAULTS_COUNT: which writes, counted from 1 in each process; FAULTS_ERRNO: with which error, or 0: wait FAULTS_MS milliseconds.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static atomic_long calls;

static int fails(int fd) {
  static __thread int inside;
  const char *below = getenv("FAULTS_BELOW");
  if (!below || inside) return 0;
  inside = 1;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  inside = 0;
  if (n <= 0) return 0;
  path[n] = 0;
  if (strncmp(path, below, strlen(below))) return 0;
  long call = atomic_fetch_add(&calls, 1) + 1, first = atol(getenv("FAULTS_FIRST")), count = atol(getenv("FAULTS_COUNT"));
  if (call < first || call >= first + count) return 0;
  int error = atoi(getenv("FAULTS_ERRNO"));
  if (!error) {
    usleep(1000 * atol(getenv("FAULTS_MS")));
    return 0;
  }
  errno = error;
  return 1;
}

#define REAL(name) ((typeof(name) *)dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) { return fails(fd) ? -1 : REAL(write)(fd, data, size); }
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) { return fails(fd) ? -1 : REAL(pwrite)(fd, data, size, at); }
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) { return fails(fd) ? -1 : REAL(pwrite64)(fd, data, size, at); }
int fsync(int fd) { return fails(fd) ? -1 : REAL(fsync)(fd); }
