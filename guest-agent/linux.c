/*
 * The agent's program: QuickJS with the bundled agent in it, and the system calls that QuickJS lacks as the module
 * `vulcan:linux` (typed in quickjs.d.ts). A function that fails returns the negative errno, as QuickJS's own do.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <arpa/inet.h>
#include <linux/capability.h>
#include <linux/fs.h>
#include <linux/openat2.h>
#include <linux/random.h>
#include <linux/sched.h>
#include <linux/securebits.h>
#include <linux/vm_sockets.h>
#include <net/if.h>
#include <net/route.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <quickjs/quickjs.h>
#include <quickjs/quickjs-libc.h>

/* libquickjs may have been built against a C library newer than this one, where strtol has this name. */
__attribute__((weak)) long __isoc23_strtol(const char *text, char **end, int base) {
  return strtol(text, end, base);
}

/* The bundle, put into the program by the assembler. */
__asm__(".section .rodata\n"
        ".global agent_source\n.global agent_source_end\n"
        "agent_source:\n.incbin \"agent.js\"\n"
        "agent_source_end:\n.byte 0\n.previous\n");
extern const char agent_source[], agent_source_end[];

#define FUNCTION(name) \
  static JSValue name(JSContext *ctx, JSValueConst self, int argc, JSValueConst *argv)
#define RESULT(call) JS_NewInt32(ctx, (call) < 0 ? -errno : 0)

/* Strings are freed by whoever asked for them; NULL for null and undefined, which no call here takes for a path. */
static const char *text_of(JSContext *ctx, JSValueConst value) {
  return JS_IsNull(value) || JS_IsUndefined(value) ? NULL : JS_ToCString(ctx, value);
}

static int64_t number_of(JSContext *ctx, JSValueConst value) {
  int64_t number = 0;
  JS_ToInt64(ctx, &number, value);
  return number;
}

static int64_t item(JSContext *ctx, JSValueConst list, uint32_t index) {
  JSValue value = JS_GetPropertyUint32(ctx, list, index);
  int64_t number = number_of(ctx, value);
  JS_FreeValue(ctx, value);
  return number;
}

static uint32_t length_of(JSContext *ctx, JSValueConst list) {
  JSValue value = JS_GetPropertyStr(ctx, list, "length");
  int64_t length = number_of(ctx, value);
  JS_FreeValue(ctx, value);
  return length;
}

/* A NULL-terminated copy of a list of strings. It is as short-lived as the call, so it ends with free_texts. */
static char **texts_of(JSContext *ctx, JSValueConst list) {
  uint32_t length = length_of(ctx, list);
  char **texts = calloc(length + 1, sizeof *texts);
  if (texts == NULL) return NULL;
  for (uint32_t i = 0; i < length; i++) {
    JSValue value = JS_GetPropertyUint32(ctx, list, i);
    const char *text = JS_ToCString(ctx, value);
    texts[i] = strdup(text == NULL ? "" : text);
    JS_FreeCString(ctx, text);
    JS_FreeValue(ctx, value);
  }
  return texts;
}

static void free_texts(char **texts) {
  for (char **at = texts; at != NULL && *at != NULL; at++) free(*at);
  free(texts);
}

/* mount(source, target, type, flags, data) */
FUNCTION(js_mount) {
  const char *source = text_of(ctx, argv[0]), *target = text_of(ctx, argv[1]), *type = text_of(ctx, argv[2]);
  const char *data = text_of(ctx, argv[4]);
  JSValue result = RESULT(mount(source, target, type, number_of(ctx, argv[3]), data));
  JS_FreeCString(ctx, source);
  JS_FreeCString(ctx, target);
  JS_FreeCString(ctx, type);
  JS_FreeCString(ctx, data);
  return result;
}

/* mknod(path, mode, major, minor) */
FUNCTION(js_mknod) {
  const char *path = text_of(ctx, argv[0]);
  mode_t mode = number_of(ctx, argv[1]);
  JSValue result = RESULT(mknod(path, mode, makedev(number_of(ctx, argv[2]), number_of(ctx, argv[3]))));
  JS_FreeCString(ctx, path);
  return result;
}

/* openIn(root, path, flags, mode): symbolic links and .. lead nowhere but below `root` */
FUNCTION(js_open_in) {
  const char *root = text_of(ctx, argv[0]), *path = text_of(ctx, argv[1]);
  int flags = number_of(ctx, argv[2]) | O_CLOEXEC;
  struct open_how how = { .flags = flags, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS };
  if (flags & O_CREAT) how.mode = number_of(ctx, argv[3]);
  int fd = -1, directory = open(root, O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (directory >= 0) fd = syscall(SYS_openat2, directory, path, &how, sizeof how);
  JSValue result = JS_NewInt32(ctx, fd < 0 ? -errno : fd);
  if (directory >= 0) close(directory);
  JS_FreeCString(ctx, root);
  JS_FreeCString(ctx, path);
  return result;
}

/* poll(buffer, count, timeout): the buffer holds `struct pollfd`s */
FUNCTION(js_poll) {
  size_t size;
  uint8_t *buffer = JS_GetArrayBuffer(ctx, &size, argv[0]);
  int64_t count = number_of(ctx, argv[1]);
  if (buffer == NULL || count < 0 || count * sizeof(struct pollfd) > size)
    return JS_ThrowRangeError(ctx, "poll: the buffer is too small");
  int ready = poll((struct pollfd *)buffer, count, number_of(ctx, argv[2]));
  return JS_NewInt32(ctx, ready < 0 ? -errno : ready);
}

/* readFirst(fd, buffer): the first bytes of a file, as many as there is room for; their number */
FUNCTION(js_read_first) {
  size_t size;
  uint8_t *buffer = JS_GetArrayBuffer(ctx, &size, argv[1]);
  if (buffer == NULL) return JS_ThrowRangeError(ctx, "readFirst: no buffer");
  ssize_t length = pread(number_of(ctx, argv[0]), buffer, size, 0);
  return JS_NewInt32(ctx, length < 0 ? -errno : length);
}

/* childSignals(): a descriptor that can be read when a child has ended */
FUNCTION(js_child_signals) {
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGCHLD);
  sigprocmask(SIG_BLOCK, &set, NULL);
  int fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
  return JS_NewInt32(ctx, fd < 0 ? -errno : fd);
}

/* reap(): [pid, exit code as a shell has it] of a child that has ended, or null */
FUNCTION(js_reap) {
  int status;
  pid_t pid = waitpid(-1, &status, WNOHANG);
  if (pid <= 0) return JS_NULL;
  JSValue pair = JS_NewArray(ctx);
  JS_SetPropertyUint32(ctx, pair, 0, JS_NewInt32(ctx, pid));
  int code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
  JS_SetPropertyUint32(ctx, pair, 1, JS_NewInt32(ctx, code));
  return pair;
}

/* setTime(ms since the epoch) */
FUNCTION(js_set_time) {
  int64_t ms = number_of(ctx, argv[0]);
  struct timespec time = { .tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000 };
  return RESULT(clock_settime(CLOCK_REALTIME, &time));
}

/* addEntropy(buffer): credited, and the generator seeded anew at once */
FUNCTION(js_add_entropy) {
  size_t size;
  uint8_t *bytes = JS_GetArrayBuffer(ctx, &size, argv[0]);
  struct { struct rand_pool_info info; uint8_t bytes[256]; } pool;
  if (bytes == NULL || size > sizeof pool.bytes) return JS_NewInt32(ctx, -EINVAL);
  pool.info.entropy_count = size * 8;
  pool.info.buf_size = size;
  memcpy(pool.info.buf, bytes, size);
  int fd = open("/dev/urandom", O_RDWR | O_CLOEXEC);
  if (fd < 0) return JS_NewInt32(ctx, -errno);
  int failed = ioctl(fd, RNDADDENTROPY, &pool) < 0 || ioctl(fd, RNDRESEEDCRNG) < 0;
  JSValue result = JS_NewInt32(ctx, failed ? -errno : 0);
  explicit_bzero(&pool, sizeof pool);
  close(fd);
  return result;
}

/* dropCache(device): what the kernel holds of a block device that nobody has open */
FUNCTION(js_drop_cache) {
  const char *path = text_of(ctx, argv[0]);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  JSValue result = JS_NewInt32(ctx, fd < 0 || ioctl(fd, BLKFLSBUF, 0) < 0 ? -errno : 0);
  if (fd >= 0) close(fd);
  JS_FreeCString(ctx, path);
  return result;
}

/* loadModule(path) */
FUNCTION(js_load_module) {
  const char *path = text_of(ctx, argv[0]);
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  JSValue result = JS_NewInt32(ctx, fd < 0 || syscall(SYS_finit_module, fd, "", 0) < 0 ? -errno : 0);
  if (fd >= 0) close(fd);
  JS_FreeCString(ctx, path);
  return result;
}

static int set_flags_up(int fd, struct ifreq *request) {
  if (ioctl(fd, SIOCGIFFLAGS, request) < 0) return -1;
  request->ifr_flags |= IFF_UP;
  return ioctl(fd, SIOCSIFFLAGS, request);
}

static void set_address(struct sockaddr *at, const char *text) {
  struct sockaddr_in *address = (struct sockaddr_in *)at;
  memset(address, 0, sizeof *address);
  address->sin_family = AF_INET;
  if (text != NULL && inet_pton(AF_INET, text, &address->sin_addr) != 1) address->sin_addr.s_addr = INADDR_NONE;
}

/* interfaceUp(name, address, netmask, gateway): the last three may be null; IPv4 */
FUNCTION(js_interface_up) {
  const char *name = text_of(ctx, argv[0]), *address = text_of(ctx, argv[1]), *netmask = text_of(ctx, argv[2]);
  const char *gateway = text_of(ctx, argv[3]);
  struct ifreq request = { 0 };
  int failed = 1, fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd >= 0) {
    strncpy(request.ifr_name, name, IFNAMSIZ - 1);
    failed = 0;
    if (address != NULL) {
      set_address(&request.ifr_addr, address);
      failed = ioctl(fd, SIOCSIFADDR, &request) < 0;
      set_address(&request.ifr_netmask, netmask);
      failed = failed || ioctl(fd, SIOCSIFNETMASK, &request) < 0;
    }
    failed = failed || set_flags_up(fd, &request) < 0;
    if (!failed && gateway != NULL) {
      struct rtentry route = { .rt_flags = RTF_UP | RTF_GATEWAY };
      set_address(&route.rt_dst, NULL);
      set_address(&route.rt_genmask, NULL);
      set_address(&route.rt_gateway, gateway);
      failed = ioctl(fd, SIOCADDRT, &route) < 0 && errno != EEXIST;
    }
  }
  JSValue result = JS_NewInt32(ctx, failed ? -errno : 0);
  if (fd >= 0) close(fd);
  JS_FreeCString(ctx, name);
  JS_FreeCString(ctx, address);
  JS_FreeCString(ctx, netmask);
  JS_FreeCString(ctx, gateway);
  return result;
}

/* vsockListen(port) */
FUNCTION(js_vsock_listen) {
  struct sockaddr_vm address = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY };
  address.svm_port = number_of(ctx, argv[0]);
  int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) return JS_NewInt32(ctx, -errno);
  if (bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 4) == 0)
    return JS_NewInt32(ctx, fd);
  int error = errno;
  close(fd);
  return JS_NewInt32(ctx, -error);
}

/* vsockAccept(fd): a connection of the host's; others are closed, which is EPERM */
FUNCTION(js_vsock_accept) {
  struct sockaddr_vm peer = { 0 };
  socklen_t size = sizeof peer;
  int fd = accept4(number_of(ctx, argv[0]), (struct sockaddr *)&peer, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd < 0) return JS_NewInt32(ctx, -errno);
  if (peer.svm_cid == VMADDR_CID_HOST) return JS_NewInt32(ctx, fd);
  close(fd);
  return JS_NewInt32(ctx, -EPERM);
}

/* release(): of the kernel */
FUNCTION(js_release) {
  struct utsname names;
  return JS_NewString(ctx, uname(&names) == 0 ? names.release : "");
}

/* setHostname(name) */
FUNCTION(js_set_hostname) {
  const char *name = text_of(ctx, argv[0]);
  JSValue result = RESULT(sethostname(name, strlen(name)));
  JS_FreeCString(ctx, name);
  return result;
}

/* powerOff(): does not return */
FUNCTION(js_power_off) {
  /* A machine that cannot be switched off would stand still; every VMM ends one that is reset. */
  reboot(RB_AUTOBOOT);
  _exit(1);
}

/* utf8(text): an ArrayBuffer */
FUNCTION(js_utf8) {
  size_t length;
  const char *text = JS_ToCStringLen(ctx, &length, argv[0]);
  if (text == NULL) return JS_EXCEPTION;
  JSValue buffer = JS_NewArrayBufferCopy(ctx, (const uint8_t *)text, length);
  JS_FreeCString(ctx, text);
  return buffer;
}

/* text(buffer, offset, length): of UTF-8 */
FUNCTION(js_text) {
  size_t size;
  uint8_t *bytes = JS_GetArrayBuffer(ctx, &size, argv[0]);
  int64_t offset = number_of(ctx, argv[1]), length = number_of(ctx, argv[2]);
  if (bytes == NULL || offset < 0 || length < 0 || (uint64_t)(offset + length) > size)
    return JS_ThrowRangeError(ctx, "text: beyond the buffer");
  return JS_NewStringLen(ctx, (const char *)bytes + offset, length);
}

/* What a process is to be, for `execute`. */
struct plan {
  char **argv, **env;
  const char *cwd, *root, *cgroup;
  uid_t uid;
  gid_t gid;
  gid_t *groups;
  uint32_t group_count;
  rlim_t file_bytes, files;
};

enum stage { STAGE_SETUP = 1, STAGE_CWD = 2, STAGE_EXEC = 3 };

static int write_text(const char *path, const char *text) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  ssize_t wrote = write(fd, text, strlen(text));
  close(fd);
  return wrote < 0 ? -1 : 0;
}

static int set_limit(int resource, rlim_t value) {
  struct rlimit limit = { value, value };
  return setrlimit(resource, &limit);
}

/* A root of its own: what the agent mounts below it later still arrives. It covers the agent's, and only somebody
   with capabilities could take it away from there. */
static int enter_root(const char *root) {
  if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0) return -1;
  if (chdir(root) < 0) return -1;
  if (mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0) return -1;
  return mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV, NULL);
}

static int drop_privileges(const struct plan *plan) {
  int bits = SECBIT_NOROOT | SECBIT_NOROOT_LOCKED | SECBIT_NO_SETUID_FIXUP | SECBIT_NO_SETUID_FIXUP_LOCKED |
             SECBIT_KEEP_CAPS_LOCKED | SECBIT_NO_CAP_AMBIENT_RAISE | SECBIT_NO_CAP_AMBIENT_RAISE_LOCKED;
  for (int capability = 0; prctl(PR_CAPBSET_READ, capability) >= 0; capability++)
    if (prctl(PR_CAPBSET_DROP, capability) < 0) return -1;
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0) return -1;
  if (setgroups(plan->group_count, plan->groups) < 0) return -1;
  if (setresgid(plan->gid, plan->gid, plan->gid) < 0) return -1;
  if (prctl(PR_SET_SECUREBITS, bits) < 0) return -1;
  if (setresuid(plan->uid, plan->uid, plan->uid) < 0) return -1;
  struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
  struct __user_cap_data_struct none[2] = { { 0 } };
  return syscall(SYS_capset, &header, none);
}

/* Tries the command in each folder of the process's own PATH, as execvpe does with the caller's. */
static void execute_command(const struct plan *plan) {
  const char *command = plan->argv[0], *path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
  if (strchr(command, '/') != NULL) {
    execve(command, plan->argv, plan->env);
    return;
  }
  for (char **at = plan->env; *at != NULL; at++)
    if (strncmp(*at, "PATH=", 5) == 0) path = *at + 5;
  int error = ENOENT;
  while (*path != '\0') {
    size_t length = strcspn(path, ":");
    char file[PATH_MAX];
    int needed = snprintf(file, sizeof file, "%.*s/%s", (int)length, path, command);
    if (length > 0 && needed < (int)sizeof file) {
      execve(file, plan->argv, plan->env);
      if (errno != ENOENT && errno != ENOTDIR) error = errno;
    }
    path += length;
    if (*path == ':') path++;
  }
  errno = error;
}

static void fail(int fd, int stage) {
  int said[2] = { stage, errno };
  if (write(fd, said, sizeof said) < 0) _exit(126);
  _exit(127);
}

static void run_child(const struct plan *plan, int streams[3], int errors) {
  sigset_t none;
  sigemptyset(&none);
  for (int signal = 1; signal < NSIG; signal++) {
    struct sigaction plain = { .sa_handler = SIG_DFL };
    sigaction(signal, &plain, NULL);
  }
  sigprocmask(SIG_SETMASK, &none, NULL);
  umask(022);
  if (setsid() < 0 || write_text("/proc/self/oom_score_adj", "0") < 0) fail(errors, STAGE_SETUP);
  /* None of the three is below 3: main() has filled those. */
  for (int i = 0; i < 3; i++)
    if (dup2(streams[i], i) < 0) fail(errors, STAGE_SETUP);
  if (syscall(SYS_close_range, 3, ~0U, 4 /* CLOSE_RANGE_CLOEXEC */) < 0) fail(errors, STAGE_SETUP);
  if (enter_root(plan->root) < 0) fail(errors, STAGE_SETUP);
  if (set_limit(RLIMIT_CORE, 0) < 0 || set_limit(RLIMIT_FSIZE, plan->file_bytes) < 0) fail(errors, STAGE_SETUP);
  if (set_limit(RLIMIT_NOFILE, plan->files) < 0) fail(errors, STAGE_SETUP);
  if (drop_privileges(plan) < 0) fail(errors, STAGE_SETUP);
  if (chdir(plan->cwd) < 0) fail(errors, STAGE_CWD);
  execute_command(plan);
  fail(errors, STAGE_EXEC);
}

/* As fork(2), with the child in a control group from the beginning: to move it there takes tens of milliseconds. */
static pid_t fork_into(const char *directory) {
  int group = open(directory, O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (group < 0) return -1;
  struct clone_args args = { .flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = group };
  pid_t pid = syscall(SYS_clone3, &args, sizeof args);
  int error = errno;
  if (pid != 0) close(group);
  errno = error;
  return pid;
}

/* Starts it; pid, and the agent's ends of its three streams, or the negative errno and the stage in `ends[0]`. */
static pid_t start(const struct plan *plan, int ends[3]) {
  int pipes[4][2], made = 0;
  for (; made < 4; made++)
    if (pipe2(pipes[made], O_CLOEXEC) < 0) break;
  pid_t pid = made == 4 ? fork_into(plan->cgroup) : -1;
  if (pid == 0) run_child(plan, (int[]){ pipes[0][0], pipes[1][1], pipes[2][1] }, pipes[3][1]);
  int said[2] = { STAGE_SETUP, errno };
  ssize_t size = sizeof said;
  if (made == 4) close(pipes[3][1]);
  if (pid > 0) {
    do size = read(pipes[3][0], said, sizeof said);
    while (size < 0 && errno == EINTR);
  }
  if (made == 4) close(pipes[3][0]);
  for (int i = 0; i < (made < 3 ? made : 3); i++) {
    int mine = i == 0 ? pipes[i][1] : pipes[i][0];
    close(i == 0 ? pipes[i][0] : pipes[i][1]);
    ends[i] = mine;
    if (size > 0) close(mine);
    else fcntl(mine, F_SETFL, O_NONBLOCK);
  }
  if (size <= 0) return pid;
  if (pid > 0) waitpid(pid, NULL, 0);
  ends[0] = said[0];
  return -said[1];
}

/* execute({argv, env, cwd, root, cgroup, uid, gid, groups, fileBytes, files}): [pid, stdin, stdout, stderr], or
   [negative errno, stage] */
FUNCTION(js_execute) {
  struct plan plan = { 0 };
  JSValue list = JS_GetPropertyStr(ctx, argv[0], "argv");
  plan.argv = texts_of(ctx, list);
  JS_FreeValue(ctx, list);
  list = JS_GetPropertyStr(ctx, argv[0], "env");
  plan.env = texts_of(ctx, list);
  JS_FreeValue(ctx, list);
  const char **texts[] = { &plan.cwd, &plan.root, &plan.cgroup };
  const char *names[] = { "cwd", "root", "cgroup" };
  for (int i = 0; i < 3; i++) {
    JSValue value = JS_GetPropertyStr(ctx, argv[0], names[i]);
    *texts[i] = JS_ToCString(ctx, value);
    JS_FreeValue(ctx, value);
  }
  int64_t numbers[4];
  const char *fields[] = { "uid", "gid", "fileBytes", "files" };
  for (int i = 0; i < 4; i++) {
    JSValue value = JS_GetPropertyStr(ctx, argv[0], fields[i]);
    numbers[i] = number_of(ctx, value);
    JS_FreeValue(ctx, value);
  }
  plan.uid = numbers[0];
  plan.gid = numbers[1];
  plan.file_bytes = numbers[2];
  plan.files = numbers[3];
  list = JS_GetPropertyStr(ctx, argv[0], "groups");
  plan.group_count = length_of(ctx, list);
  plan.groups = calloc(plan.group_count + 1, sizeof *plan.groups);
  for (uint32_t i = 0; i < plan.group_count; i++) plan.groups[i] = item(ctx, list, i);
  JS_FreeValue(ctx, list);

  int ends[3] = { 0 };
  pid_t pid = start(&plan, ends);
  JSValue result = JS_NewArray(ctx);
  JS_SetPropertyUint32(ctx, result, 0, JS_NewInt32(ctx, pid));
  for (int i = 0; i < (pid < 0 ? 1 : 3); i++) JS_SetPropertyUint32(ctx, result, i + 1, JS_NewInt32(ctx, ends[i]));
  for (int i = 0; i < 3; i++) JS_FreeCString(ctx, *texts[i]);
  free_texts(plan.argv);
  free_texts(plan.env);
  free(plan.groups);
  return result;
}

/* errorText(errno) */
FUNCTION(js_error_text) {
  return JS_NewString(ctx, strerror(number_of(ctx, argv[0])));
}

static const JSCFunctionListEntry functions[] = {
  JS_CFUNC_DEF("mount", 5, js_mount),
  JS_CFUNC_DEF("mknod", 4, js_mknod),
  JS_CFUNC_DEF("openIn", 4, js_open_in),
  JS_CFUNC_DEF("poll", 3, js_poll),
  JS_CFUNC_DEF("readFirst", 2, js_read_first),
  JS_CFUNC_DEF("childSignals", 0, js_child_signals),
  JS_CFUNC_DEF("reap", 0, js_reap),
  JS_CFUNC_DEF("setTime", 1, js_set_time),
  JS_CFUNC_DEF("addEntropy", 1, js_add_entropy),
  JS_CFUNC_DEF("dropCache", 1, js_drop_cache),
  JS_CFUNC_DEF("loadModule", 1, js_load_module),
  JS_CFUNC_DEF("interfaceUp", 4, js_interface_up),
  JS_CFUNC_DEF("vsockListen", 1, js_vsock_listen),
  JS_CFUNC_DEF("vsockAccept", 1, js_vsock_accept),
  JS_CFUNC_DEF("release", 0, js_release),
  JS_CFUNC_DEF("setHostname", 1, js_set_hostname),
  JS_CFUNC_DEF("powerOff", 0, js_power_off),
  JS_CFUNC_DEF("utf8", 1, js_utf8),
  JS_CFUNC_DEF("text", 3, js_text),
  JS_CFUNC_DEF("execute", 1, js_execute),
  JS_CFUNC_DEF("errorText", 1, js_error_text),
};

static int init_module(JSContext *ctx, JSModuleDef *module) {
  return JS_SetModuleExportList(ctx, module, functions, sizeof functions / sizeof *functions);
}

/* Descriptors 0 to 2 are there, whatever the kernel has given; the console takes what is written to them. */
static void open_console(void) {
  mkdir("/dev", 0755);
  mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID | MS_NOEXEC, "mode=0755");
  int fd = open("/dev/console", O_RDWR | O_NOCTTY);
  if (fd < 0) fd = open("/dev/null", O_RDWR);
  for (int i = 0; fd >= 0 && i < 3; i++)
    if (fd != i) dup2(fd, i);
  if (fd > 2) close(fd);
}

int main(int argc, char **argv) {
  if (getpid() != 1) {
    fprintf(stderr, "this is the agent of a virtual machine: it runs as its first process only\n");
    return 64;
  }
  open_console();
  prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
  signal(SIGPIPE, SIG_IGN);
  umask(0);
  JSRuntime *runtime = JS_NewRuntime();
  JSContext *ctx = runtime == NULL ? NULL : JS_NewContext(runtime);
  if (ctx == NULL) js_power_off(NULL, JS_UNDEFINED, 0, NULL);
  js_std_init_handlers(runtime);
  js_std_add_helpers(ctx, argc, argv);
  js_init_module_os(ctx, "quickjs:os");
  JSModuleDef *module = JS_NewCModule(ctx, "vulcan:linux", init_module);
  JS_AddModuleExportList(ctx, module, functions, sizeof functions / sizeof *functions);
  JSValue done = JS_Eval(ctx, agent_source, agent_source_end - agent_source, "agent.js", JS_EVAL_TYPE_MODULE);
  done = js_std_await(ctx, done);
  /* The agent runs for as long as the machine does: to come here is an error. */
  if (JS_IsException(done)) js_std_dump_error(ctx);
  fflush(NULL);
  js_power_off(ctx, JS_UNDEFINED, 0, NULL);
}
