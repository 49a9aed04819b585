# Test VMs: a kernel, and an initramfs of busybox, modules and guest/vm-init, under QEMU without KVM. Sourced after
# common.sh and guest.sh.
#
# A VM of this kind is the machine that the server runs on, where a guest of guest.sh is a machine that one of our
# devices is given to. Its kernels are Debian's packages, not a byte changed, from the releases that have them; and the
# reference kernel, where it is there.

vm_kernels=(debian-6.1 debian-6.12 reference)
# Everything a VM may load. A kernel that has one built in, or does not have it, is no worse for that.
vm_modules=(fuse cuse vfio-pci vfio_iommu_type1)
vm_packages=(qemu-system-x86 cpio xz-utils)

# choose_vm KERNEL: sets where its image is, and the Debian release that its kernel is from.
choose_vm() {
  choose_guest x86_64
  vm_kernel=$1
  case $vm_kernel in
    debian-6.1) guest_release=bookworm ;;
    debian-6.12) guest_release=trixie ;;
    reference) [[ -x $shared/oracle/reference-kernel ]] || die "there is no reference kernel at $shared/oracle" ;;
    *) die "there is no kernel '$vm_kernel', only: ${vm_kernels[*]}" ;;
  esac
  vm_directory=$cache/vm/$vm_kernel
  guest_directory=$vm_directory
}

# vm_image: makes $vm_directory/kernel and $vm_directory/initramfs.gz, where they are not there or are not of this source.
vm_image() {
  local stamp
  stamp=$(cat "$repo"/tools/lib/{guest,vm}.sh "$repo/tools/guest/vm-init" | sha256sum)
  [[ ! -e $vm_directory/stamp || $(<"$vm_directory/stamp") != "$stamp" ]] || return 0
  if [[ $vm_kernel == reference ]]; then
    mkdir -p "$vm_directory/modules"
    (choose_vm debian-6.12 && vm_image) || exit
    cp "$cache/vm/debian-6.12/busybox" "$vm_directory/"
    cp "$("$shared/oracle/reference-kernel")" "$vm_directory/kernel"
  else
    keep_what_is_needed || exit
  fi
  pack_vm
  printf '%s\n' "$stamp" >"$vm_directory/stamp"
}

# keep_what_is_needed: of the packages, which are large, the kernel, busybox and the modules; once.
keep_what_is_needed() {
  local root=$vm_directory/root module file
  [[ ! -e $vm_directory/kept || $(<"$vm_directory/kept") != "${vm_modules[*]}" ]] || return 0
  fetch_guest
  rm -rf "$vm_directory/modules" "$vm_directory/kept"
  mkdir "$vm_directory/modules"
  mv "$root"/boot/vmlinuz-* "$vm_directory/kernel"
  mv "$(find "$root" -path '*bin/busybox')" "$vm_directory/busybox"
  for module in "${vm_modules[@]}"; do
    while read -r file; do
      xz -dcf <"$file" >"$vm_directory/modules/$(basename "${file%.xz}")"
      basename "${file%.xz}"
    done < <(module_closure "$root" "$module" | awk '!seen[$0]++') >"$vm_directory/modules/$module.order"
  done
  rm -rf "$root" "$vm_directory/complete"
  printf '%s\n' "${vm_modules[*]}" >"$vm_directory/kept"
}

# pack_vm: the initramfs without what one run puts in.
pack_vm() {
  local root
  root=$(mktemp -d "$cache/initramfs.XXXXXX")
  # As Debian's: bin is a link there, which nothing else can be in its place.
  mkdir -p "$root"/{usr/bin,dev,proc,sys,tmp,run,etc,home/user,vm}
  ln -s usr/bin "$root/bin"
  cp "$vm_directory/busybox" "$root/bin/"
  cp -r "$vm_directory/modules" "$root/"
  cp "$repo/tools/guest/vm-init" "$root/init"
  chmod 755 "$root/init" "$root/bin/busybox"
  printf '%s\n' root:x:0:0::/:/bin/sh user:x:1000:1000::/home/user:/bin/sh >"$root/etc/passwd"
  printf '%s\n' root:x:0: user:x:1000: >"$root/etc/group"
  pack_directory "$root" | gzip -1 >"$vm_directory/initramfs.gz"
  # Where the next archive may begin.
  truncate -s %4 "$vm_directory/initramfs.gz"
  rm -rf "$root"
}

# pack_directory DIRECTORY: an archive of what is in it, all of it root's.
pack_directory() { (cd "$1" && find . | cpio --quiet -o -H newc -R 0:0); }

# static_programs [TARGET]: builds the project's programs so that they run without any library, and prints where they are. They
# are optimized a little, since an emulated machine runs them. For a target that is not this machine's, the clients alone.
static_programs() {
  local target=${1:-x86_64-unknown-linux-gnu} directory packages=(conformance)
  directory=$(target_dir)/vm
  if [[ $target == x86_64-unknown-linux-gnu ]]; then
    packages+=(uiommufd e2e differential)
  else
    need_target "$target"
  fi
  CARGO_PROFILE_DEV_OPT_LEVEL=1 CARGO_PROFILE_DEV_STRIP=debuginfo RUSTFLAGS='-C target-feature=+crt-static' \
    cargo build --quiet --manifest-path "$repo/Cargo.toml" --target-dir "$directory" --target "$target" \
    "${packages[@]/#/--package=}" --bins >&2 || die "the programs for $target do not build"
  printf '%s\n' "$directory/$target/debug"
}

# need_target TARGET: Rust's standard library for it.
need_target() {
  (
    cd "$repo"
    have rustup && { rustup target list --installed | grep -qx "$1" || rustup target add "$1"; } >"$cache/rustup.log" 2>&1
  ) || die "Rust's standard library for $1 is not there: rustup target add $1"
}
