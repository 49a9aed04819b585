/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * How a program gets the descriptors that ioctls of uiommufd's files return, when uiommufd has not started it.
 *
 * VFIO_GROUP_GET_DEVICE_FD, IOMMU_FAULT_QUEUE_ALLOC, IOMMU_VEVENTQ_ALLOC, VFIO_DEVICE_FEATURE of a dma-buf and some of
 * IOMMU_TEST_CMD return a new descriptor, which no file system in user space can put into a program. So the program
 * opens it: libuiommufd_preload.so does what follows for programs that know nothing of it.
 *   1. UIOMMUFD_CALL on the same file, with cmd and arg of such an ioctl. If it fails, or UIOMMUFD_CALL_DONE is not in
 *      flags after it, the ioctl is to be made as it is: the file is not uiommufd's, or the ioctl returns no descriptor there.
 *   2. Without UIOMMUFD_CALL_OPEN in flags the ioctl has returned value; a negative one is its errno. EMFILE may also mean
 *      that 16 descriptors of this process wait to be opened, and ENOTTY that there is a descriptor which this process could
 *      not open: it does not see the directory of the nodes, or is in a pid namespace that the server does not see.
 *   3. With it, open(path, open_flags) is the new descriptor. It works once, within 5 seconds, for this process alone.
 *      If fd_at is 0 the ioctl returns the descriptor's number. Otherwise it returns 0, and the number belongs into the
 *      __s32 at address fd_at, which was writable when the server looked.
 *   4. A path that is not opened is given back by UIOMMUFD_CALL_UNDO with the same struct: the ioctl is undone. So it is
 *      when the time is over, or the file of step 1 is closed.
 */
#ifndef UIOMMUFD_FD_H
#define UIOMMUFD_FD_H

#include <linux/types.h>

/* _IO('u', 'i'), with a struct uiommufd_call: make an ioctl that may return a descriptor. */
#define UIOMMUFD_CALL 0x7569
/* _IO('u', 'j'), with the struct that the call has left: its descriptor will not be opened. ENOENT: it has been, or the
 * time was over. */
#define UIOMMUFD_CALL_UNDO 0x756a

/* uiommufd_call.flags: the ioctl has been made. */
#define UIOMMUFD_CALL_DONE (1 << 0)
/* uiommufd_call.flags: and path is to be opened. */
#define UIOMMUFD_CALL_OPEN (1 << 1)

/**
 * struct uiommufd_call - an ioctl that may return a descriptor
 * @argsz: in: the size of this struct in bytes, 512 or more
 * @cmd: in: the ioctl
 * @arg: in: its argument
 * @flags: in: 0; out: UIOMMUFD_CALL_DONE, and UIOMMUFD_CALL_OPEN or not
 * @value: out: what the ioctl returns, without UIOMMUFD_CALL_OPEN; an errno as a negative number
 * @open_flags: out: the second argument of open
 * @__reserved: out: 0
 * @fd_at: out: where the number of the descriptor belongs, or 0
 * @path: out: what to open, absolute, with a zero behind it
 */
struct uiommufd_call {
	__u32 argsz;
	__u32 cmd;
	__aligned_u64 arg;
	__u32 flags;
	__s32 value;
	__u32 open_flags;
	__u32 __reserved;
	__aligned_u64 fd_at;
	char path[472];
};

#endif
