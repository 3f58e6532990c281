/*
 * CRIU plugin for dumps: descriptors and mappings of the NVIDIA driver's device nodes are accepted.
 *
 * CRIU refuses both, and a process may have some after the driver's checkpoint: forked processes inherit them, and
 * NVML has its own. CRIU writes such a descriptor as "external" and marks such a mapping. gpusnap then rewrites both
 * in the images (shim/images/src/devices.rs), so that no restore needs a plugin.
 *
 * The types are those of CRIU's interface for plugins, version 0.2 (CRIU 2.0 and later), criu/include/criu-plugin.h.
 * The table ends with the last hook that is used: a CRIU that knows more hooks, or fewer, takes it.
 */
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { DUMP_EXT_FILE = 2, HANDLE_DEVICE_VMA = 7, HOOKS };

struct plugin {
	const char *name;
	int (*init)(int stage);
	void (*exit)(int stage, int result);
	unsigned int version;
	unsigned int max_hooks;
	void *hooks[HOOKS];
};

static const char DEVICES[] = "/dev/nvidia";

static int accept_device(int fd)
{
	char link[32];
	char path[sizeof(DEVICES) - 1];

	snprintf(link, sizeof(link), "/proc/self/fd/%d", fd);
	if (readlink(link, path, sizeof(path)) != sizeof(path))
		return -ENOTSUP;
	return memcmp(path, DEVICES, sizeof(path)) ? -ENOTSUP : 0;
}

static int dump_file(int fd, int id)
{
	(void)id;
	return accept_device(fd);
}

static int handle_mapping(int fd, const struct stat *stat)
{
	(void)stat;
	return accept_device(fd);
}

static int begin(int stage)
{
	(void)stage;
	return 0;
}

static void end(int stage, int result)
{
	(void)stage;
	(void)result;
}

struct plugin CR_PLUGIN_DESC = {
	.name = "gpusnap-devices",
	.init = begin,
	.exit = end,
	.version = 2 << 8,
	.max_hooks = HOOKS,
	.hooks = { [DUMP_EXT_FILE] = (void *)dump_file, [HANDLE_DEVICE_VMA] = (void *)handle_mapping },
};
