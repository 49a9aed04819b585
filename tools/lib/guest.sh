# The guest that boots under QEMU: Debian's own kernel, not a byte changed, and an initramfs with busybox, the kernel's
# nvme and ioatdma modules and guest/init. Sourced after common.sh. Nothing is installed into the machine.

guest_packages=(qemu-system-x86 busybox-static cpio)

# guest_kernel: downloads and extracts Debian's kernel package once; prints the directory it lies in.
guest_kernel() {
  local package directory
  package=$(apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
  if [[ -z $package ]]; then
    ((EUID != 0)) || apt-get update -qq >"$cache/apt.log" 2>&1 || true
    package=$(apt-cache depends linux-image-amd64 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
  fi
  [[ -n $package ]] || die "apt knows no linux-image-amd64: is 'apt-get update' due, or is this not Debian amd64?"
  directory=$cache/kernel/$package
  if [[ ! -e $directory/complete ]]; then
    note "downloading $package (70 MB, once)"
    rm -rf "$directory"
    mkdir -p "$directory"
    (cd "$directory" && apt-get download "$package" >apt.log 2>&1) ||
      die "apt-get could not download $package; see $directory/apt.log"
    dpkg-deb -x "$directory"/*.deb "$directory"
    rm "$directory"/*.deb
    touch "$directory/complete"
  fi
  printf '%s\n' "$directory"
}

# module_closure DIRECTORY MODULE: the module's file and those of what it depends on, in the order to load them.
module_closure() {
  local file dependency
  file=$(find "$1" -name "${2//-/[-_]}.ko" -o -name "${2//_/[-_]}.ko" | head -1)
  [[ -n $file ]] || return 0 # built into the kernel
  while read -r dependency; do
    module_closure "$1" "$dependency"
  done < <(tr '\0' '\n' <"$file" | sed -n 's/^depends=//p' | tr ',' '\n' | sed '/^$/d')
  printf '%s\n' "$file"
}

# guest_image: prints the paths of the kernel and of the initramfs, made anew when something in it has changed.
guest_image() {
  local kernel initramfs busybox
  kernel=$(guest_kernel) || exit
  busybox=$(command -v busybox) || die "busybox is missing: apt-get install busybox-static"
  initramfs=$kernel/initramfs.gz
  if [[ ! $initramfs -nt $repo/tools/guest/init || ! $initramfs -nt $repo/tools/lib/guest.sh ]]; then
    pack_initramfs "$kernel" "$busybox" "$initramfs"
  fi
  printf '%s\n%s\n' "$(find "$kernel/boot" -name 'vmlinuz-*' | head -1)" "$initramfs"
}

# pack_initramfs KERNEL-DIRECTORY BUSYBOX OUTPUT
pack_initramfs() {
  local root driver modules module
  root=$(mktemp -d "$cache/initramfs.XXXXXX")
  mkdir -p "$root"/{bin,dev,proc,sys,tmp,modules}
  cp "$2" "$root/bin/busybox"
  cp "$repo/tools/guest/init" "$root/init"
  chmod 755 "$root/init" "$root/bin/busybox"
  for driver in nvme ioatdma; do
    mapfile -t modules < <(module_closure "$1" "$driver" | awk '!seen[$0]++')
    ((${#modules[@]})) || die "the kernel package in $1 has no $driver module"
    for module in "${modules[@]}"; do
      cp "$module" "$root/modules/"
      basename "$module" >>"$root/modules/$driver.order"
    done
  done
  (cd "$root" && find . | cpio --quiet -o -H newc | gzip -1) >"$3.new"
  mv "$3.new" "$3"
  rm -rf "$root"
}
