/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * uiommufd's own type of virtual IOMMU: a guest's VT-d unit whose translation tables are shadowed.
 *
 * They are used with IOMMU_VIOMMU_ALLOC, IOMMU_HWPT_ALLOC, IOMMU_HWPT_INVALIDATE and IOMMU_VEVENTQ_ALLOC of
 * <linux/iommufd.h>, beside Linux's types, whose numbers they will never share. A server that was started with --strict
 * answers EOPNOTSUPP for them.
 *
 * A VMM that emulates VT-d does this:
 *   1. IOMMU_HWPT_ALLOC with IOMMU_HWPT_ALLOC_NEST_PARENT over the IOAS that holds the guest's memory, by guest address.
 *   2. IOMMU_VIOMMU_ALLOC of UIOMMUFD_VIOMMU_TYPE_VTD_SHADOW over it, with the guest's root table address.
 *   3. For each device: IOMMU_VDEVICE_ALLOC with its source id (bus << 8 | device and function) as virtual id,
 *      IOMMU_HWPT_ALLOC of UIOMMUFD_HWPT_DATA_VTD_FOLLOWED over the virtual IOMMU, and an attach to that page table. From
 *      then on the device is in whatever domain the guest's context and PASID entries put it.
 *   4. IOMMU_HWPT_INVALIDATE of the virtual IOMMU with the descriptors that the guest has queued, in their order.
 *   5. IOMMU_VEVENTQ_ALLOC of UIOMMUFD_VEVENTQ_TYPE_VTD_FAULT: fault records for the guest.
 *
 * All numbers are little endian. docs/abi.md has the order of checks.
 */
#ifndef UIOMMUFD_VTD_H
#define UIOMMUFD_VTD_H

#include <linux/types.h>

/* iommu_viommu_alloc.type: struct uiommufd_viommu_vtd_shadow. */
#define UIOMMUFD_VIOMMU_TYPE_VTD_SHADOW 0x75690010
/* iommu_hwpt_alloc.data_type, over such a virtual IOMMU: struct uiommufd_hwpt_vtd_followed. */
#define UIOMMUFD_HWPT_DATA_VTD_FOLLOWED 0x75690011
/* iommu_hwpt_invalidate.data_type: struct uiommufd_vtd_descriptor. */
#define UIOMMUFD_VIOMMU_INVALIDATE_DATA_VTD 0x75690012
/* iommu_veventq_alloc.type: struct uiommufd_vtd_fault. */
#define UIOMMUFD_VEVENTQ_TYPE_VTD_FAULT 0x75690013

/* uiommufd_viommu_vtd_shadow.flags: the guest has translation enabled (GCMD_REG.TE). */
#define UIOMMUFD_VTD_TRANSLATION (1 << 0)

/**
 * struct uiommufd_viommu_vtd_shadow - the guest's unit
 * @root: RTADDR_REG: the guest address of the root table, and bits 11:10 the mode: 0 legacy, 1 scalable
 * @flags: UIOMMUFD_VTD_TRANSLATION; without it devices use guest addresses
 */
struct uiommufd_viommu_vtd_shadow {
	__aligned_u64 root;
	__aligned_u64 flags;
};

/* uiommufd_hwpt_vtd_followed.pasid: the requests have this PASID; without it they have none. */
#define UIOMMUFD_VTD_PASID_VALID (1ULL << 32)

/**
 * struct uiommufd_hwpt_vtd_followed - the page table of one requester, wherever the guest has it
 * @virtual_id: its source id, for which there is a virtual device
 * @pasid: its PASID with UIOMMUFD_VTD_PASID_VALID, or 0
 */
struct uiommufd_hwpt_vtd_followed {
	__aligned_u64 virtual_id;
	__aligned_u64 pasid;
};

/**
 * struct uiommufd_vtd_descriptor - what the guest has invalidated
 * @words: an invalidation descriptor as the guest queued it, of 128 bits; of 256 when entry_len says so, the upper half
 *	zero: context cache, IOTLB, PASID-based IOTLB, PASID cache, device TLB (nothing is done), wait (its status is written
 *	once no DMA of before is under way; its interrupt is the VMM's).
 *	A descriptor of type 0, which VT-d reserves, says that the guest has written RTADDR_REG or GCMD_REG.TE:
 *	words[0] is UIOMMUFD_VTD_TRANSLATION << 4 or 0, words[1] RTADDR_REG.
 */
struct uiommufd_vtd_descriptor {
	__aligned_u64 words[2];
};

/**
 * struct uiommufd_vtd_fault - what a request, or the guest's tables, did wrong
 * @words: a fault recording register of 128 bits with its F bit set
 */
struct uiommufd_vtd_fault {
	__aligned_u64 words[2];
};

#endif
