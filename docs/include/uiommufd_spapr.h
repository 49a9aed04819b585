/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * uiommufd's own types for IOMMUs that translate by windows (SPAPR TCE), in the ioctls of Linux's iommufd.
 *
 * They are used with IOMMU_HWPT_ALLOC and IOMMU_GET_HW_INFO of <linux/iommufd.h>, beside Linux's types, whose numbers
 * they will never share. A server that was started with --strict answers EOPNOTSUPP for them.
 *
 * All numbers are little endian, as the host. docs/abi.md has the order of checks.
 */
#ifndef UIOMMUFD_SPAPR_H
#define UIOMMUFD_SPAPR_H

#include <linux/types.h>

/* iommu_hw_info.out_data_type (and in_data_type): struct uiommufd_hw_info_spapr. */
#define UIOMMUFD_HW_INFO_TYPE_SPAPR 0x75690001
/* iommu_hwpt_alloc.data_type: struct uiommufd_hwpt_spapr. */
#define UIOMMUFD_HWPT_DATA_SPAPR 0x75690001

/* The most windows of one page table, and the most slots of an IOMMU. */
#define UIOMMUFD_SPAPR_MAX_WINDOWS 16

/* uiommufd_hw_info_spapr.flags: windows can be made; without it there is the default window alone. */
#define UIOMMUFD_SPAPR_DYNAMIC_WINDOWS (1 << 0)

/**
 * struct uiommufd_hw_info_spapr - what windows the IOMMU of a device can have
 * @flags: UIOMMUFD_SPAPR_DYNAMIC_WINDOWS
 * @max_levels: the most levels of a window's table
 * @page_sizes: the sizes of pages as a bitmap: bit n is a page of 2^n bytes
 * @default_window_size: bytes of the default window. It begins at the first base, has the smallest page that there is
 *	(4 KiB as a rule) and one level; it is what a page table without data has
 * @slots: how many windows there can be at once
 * @__reserved: 0
 * @bases: the IOVA at which the window of each slot begins; as many as @slots, the length of the data says how many
 *	there were room for
 */
struct uiommufd_hw_info_spapr {
	__u32 flags;
	__u32 max_levels;
	__aligned_u64 page_sizes;
	__aligned_u64 default_window_size;
	__u32 slots;
	__u32 __reserved;
	__aligned_u64 bases[];
};

/**
 * struct uiommufd_spapr_window - one window
 * @base: its first IOVA, which is that of a slot
 * @size: its bytes, a power of two
 * @page_shift: log2 of its page in bytes, one of the IOMMU's
 * @levels: levels of its table, 1 to the IOMMU's maximum
 */
struct uiommufd_spapr_window {
	__aligned_u64 base;
	__aligned_u64 size;
	__u32 page_shift;
	__u32 levels;
};

/**
 * struct uiommufd_hwpt_spapr - a page table of windows over an IOAS
 * @flags: 0
 * @window_count: how many windows, 1 to UIOMMUFD_SPAPR_MAX_WINDOWS
 * @windows: the windows, in any order; iommu_hwpt_alloc.data_len is exactly as long
 *
 * All devices of a group have all windows of one page table. To grow, shrink, add or remove a window, make another
 * page table over the same IOAS and attach the devices to it: each DMA sees the old windows or the new ones, and where
 * both have a window of the same base, size and page, there is no gap. Areas of the IOAS must lie in the windows of
 * every page table over it, each in one, aligned to its page.
 */
struct uiommufd_hwpt_spapr {
	__u32 flags;
	__u32 window_count;
	struct uiommufd_spapr_window windows[];
};

#endif
