# The guests that boot under QEMU, one for each architecture: Debian's own kernel, not a byte changed, and an initramfs
# with busybox, the kernel's drivers for our devices and guest/init. Sourced after common.sh.
#
# Everything comes from Debian packages of the guest's architecture, by an apt whose state is a directory of its own:
# the machine's apt learns no architecture, and nothing is installed into the machine but QEMU.

guest_arches=(x86_64 ppc64le)

# choose_guest ARCH: sets what is different from one architecture to the next.
choose_guest() {
  guest_arch=$1
  guest_drivers=(nvme)
  # Options of the server: what its containers are to the guest's QEMU.
  guest_server=()
  # What the guest has besides kernel and busybox: packages, and the program that they are for.
  guest_extra_packages=()
  guest_extra_program=
  # The Debian release to take packages from, where it is not the machine's own.
  guest_release=
  case $guest_arch in
    x86_64)
      guest_debian=amd64
      guest_kernel_package=linux-image-amd64
      guest_qemu=qemu-system-x86_64
      guest_packages=(qemu-system-x86 cpio)
      guest_machine=(-machine pc -cpu max)
      guest_console=ttyS0
      guest_drivers+=(ioatdma vfio_iommu_type1 vfio-pci)
      ;;
    ppc64le)
      guest_debian=ppc64el
      guest_kernel_package=linux-image-powerpc64le
      guest_qemu=qemu-system-ppc64
      guest_packages=(qemu-system-ppc cpio)
      # What QEMU would warn that TCG does not have.
      guest_machine=(-machine 'pseries,cap-cfpc=broken,cap-sbbc=broken,cap-ibs=broken,cap-ccf-assist=off')
      guest_console=hvc0
      guest_server=(--container spapr-v2)
      # On pseries a PCI function comes and goes by the firmware's calls, which this program makes.
      guest_drivers+=(rpaphp)
      guest_extra_packages=(powerpc-ibm-utils librtas2 libnuma1 libc6)
      guest_extra_program=usr/sbin/drmgr
      ;;
    *) die "there is no guest of architecture '$guest_arch', only: ${guest_arches[*]}" ;;
  esac
  guest_directory=$cache/guest/$guest_arch
}

# guest_apt COMMAND ARGUMENTS...: runs apt-get or apt-cache for the guest's architecture, from the machine's own mirrors.
guest_apt() {
  local command=$1 state=$guest_directory/apt
  shift
  "$command" -o Dir::State="$state" -o Dir::State::status="$state/status" -o Dir::Cache="$state" \
    -o Dir::Etc::SourceList="$state/sources.list" -o Dir::Etc::SourceParts=/dev/null \
    -o APT::Architecture="$guest_debian" -o APT::Architectures="$guest_debian" -o APT::Sandbox::User=root "$@"
}

# guest_sources: the lines of a sources.list for the guest's architecture, of $guest_release where there is one.
guest_sources() {
  local lines
  lines=$(apt-get indextargets --format 'deb [arch=%] $(REPO_URI) $(RELEASE) main $(ORIGIN)' 'Created-By: Packages' |
    sed -n "s/%/$guest_debian/; s/ main Debian\$/ main/p" | sort -u)
  [[ -n $lines ]] || die "apt knows no Debian mirror: is 'apt-get update' due, or is this not Debian?"
  # Any release is on the mirror that has the machine's own.
  [[ -z $guest_release ]] || lines=$(grep -v -e -security -e ports <<<"$lines" | sed -n "1s/ [^ ]* main\$/ $guest_release main/p")
  printf '%s\n' "$lines"
}

# start_apt: empties $guest_directory and makes an apt there that knows the packages and has none installed.
start_apt() {
  rm -rf "$guest_directory"
  mkdir -p "$guest_directory"/{root,packages,apt/lists/partial,apt/archives/partial}
  : >"$guest_directory/apt/status"
  guest_sources >"$guest_directory/apt/sources.list" || exit
  # Not every mirror has every architecture. Those that have it are enough, if they know what is wanted.
  guest_apt apt-get update >"$guest_directory/apt.log" 2>&1 || true
}

# extract_packages: unpacks what has been downloaded into $guest_directory/root, and ends that apt.
extract_packages() {
  local package
  for package in "$guest_directory"/packages/*.deb; do dpkg-deb -x "$package" "$guest_directory/root"; done
  rm -r "$guest_directory"/{packages,apt}
  touch "$guest_directory/complete"
}

# fetch_guest: downloads and extracts the packages, once.
fetch_guest() {
  local packages kernel log=$guest_directory/apt.log
  [[ ! -e $guest_directory/complete ]] || return 0
  note "downloading Debian's kernel for $guest_arch${guest_release:+ of $guest_release} (70 to 110 MB, once)"
  start_apt
  kernel=$(guest_apt apt-cache depends "$guest_kernel_package" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
  [[ -n $kernel ]] || die "apt knows no $guest_kernel_package of architecture $guest_debian; see $log"
  packages=("$kernel" busybox-static "${guest_extra_packages[@]}")
  (cd "$guest_directory/packages" && guest_apt apt-get download "${packages[@]}" >>"$log" 2>&1) ||
    die "apt-get could not download ${packages[*]}; see $log"
  extract_packages
}

# module_closure DIRECTORY MODULE: the module's file and those of what it depends on, in the order to load them. A
# compressed one may be among them.
module_closure() {
  local file dependency name=${2//[-_]/[-_]}
  file=$(find "$1" -name "$name.ko" -o -name "$name.ko.xz" | head -1)
  [[ -n $file ]] || return 0 # built into the kernel
  while read -r dependency; do
    module_closure "$1" "$dependency"
  done < <(xz -dcf <"$file" | tr '\0' '\n' | sed -n 's/^depends=//p' | tr ',' '\n' | sed '/^$/d')
  printf '%s\n' "$file"
}

# guest_image: prints the paths of the kernel and of the initramfs, made anew when something in it has changed.
guest_image() {
  local initramfs=$guest_directory/initramfs.gz
  fetch_guest || exit
  if [[ ! $initramfs -nt $repo/tools/guest/init || ! $initramfs -nt $repo/tools/lib/guest.sh ]]; then
    pack_initramfs "$initramfs"
  fi
  printf '%s\n%s\n' "$(find "$guest_directory/root/boot" -name 'vmlinu[xz]-*' | head -1)" "$initramfs"
}

# unpacked_guest DIRECTORY: the same kernel and initramfs as files 'kernel' and 'initramfs' there, without their
# compression. An emulator inside an emulated machine takes minutes to undo it.
unpacked_guest() {
  local kernel initramfs offset
  { read -r kernel && read -r initramfs; } < <(guest_image)
  offset=$(LC_ALL=C grep -aobP '\xfd7zXZ\x00' "$kernel" | head -1 | cut -d: -f1)
  # Behind the archive are other parts of the file, which xz complains about.
  tail -c "+$((offset + 1))" "$kernel" | xz -dc 2>/dev/null >"$1/kernel" || true
  [[ $(head -c 4 "$1/kernel") == $'\177ELF' ]] || die "$kernel is not packed by xz"
  zcat "$initramfs" >"$1/initramfs"
}

# pack_initramfs OUTPUT
pack_initramfs() {
  local root driver modules module from=$guest_directory/root
  root=$(mktemp -d "$cache/initramfs.XXXXXX")
  mkdir -p "$root"/{bin,dev,proc,sys,tmp,modules}
  cp "$from/bin/busybox" "$root/bin/busybox"
  cp "$repo/tools/guest/init" "$root/init"
  chmod 755 "$root/init" "$root/bin/busybox"
  for driver in "${guest_drivers[@]}"; do
    mapfile -t modules < <(module_closure "$from" "$driver" | awk '!seen[$0]++')
    ((${#modules[@]})) || die "the kernel package in $from has no $driver module"
    for module in "${modules[@]}"; do
      cp "$module" "$root/modules/"
      basename "$module" >>"$root/modules/$driver.order"
    done
  done
  [[ -z $guest_extra_program ]] || add_program "$from" "$guest_extra_program" "$root"
  (cd "$root" && find . | cpio --quiet -o -H newc | gzip -1) >"$1.new"
  mv "$1.new" "$1"
  rm -rf "$root"
}

# add_program FROM PROGRAM TO: copies a program, and the loader and the libraries that it has in FROM, to where it looks
# for them.
add_program() {
  local file loader
  mkdir -p "$3/lib64"
  cp "$1/$2" "$3/bin/"
  loader=$(find "$1/lib" -name 'ld64.so.*')
  cp -L "$loader" "$3/lib64/"
  for file in $(find "$1/lib" "$1/usr/lib" \( -name 'libc.so.*' -o -name 'librtas.so.*' -o -name 'libnuma.so.*' \)); do
    (cd "$1" && cp -L --parents "${file#"$1"/}" "$3/")
  done
}
