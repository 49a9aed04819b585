# A Debian user space for the test VMs of vm.sh: packages of the release that the project's own package is made for,
# installed and configured by dpkg into a root of their own. Sourced after common.sh and guest.sh.
#
# mmdebstrap makes it. That is taken out of its package and run from .cache, and everything is fetched from the
# machine's own mirror, so the machine gets nothing installed. The packages' scripts run in a chroot, which takes root.

debian_release=bookworm
# systemd and udev with a bus, what loads modules, users, and the QEMU of the main job.
debian_packages=(systemd-sysv udev dbus kmod passwd adduser qemu-system-x86)
# Nobody reads in a VM.
debian_left_out=(./usr/share/{doc,man,locale,info,iso-codes})

# debian_image: makes $cache/debian/root.cpio, where it is not there or was made of something else. It has a user 'user'.
debian_image() {
  local directory=$cache/debian stamp
  stamp="$debian_release: ${debian_packages[*]}, without ${debian_left_out[*]}"
  [[ ! -e $directory/stamp || $(<"$directory/stamp") != "$stamp" ]] || return 0
  ((EUID == 0)) || die "root has to make the VM's Debian, once: tools/vm debian-6.12 --debian -- true"
  note "installing a Debian of $debian_release into a directory (100 MB to download, once)"
  choose_guest x86_64
  guest_release=$debian_release
  rm -rf "$directory"
  mkdir -p "$directory"
  (cd "$directory" && apt-get download -o APT::Sandbox::User=root mmdebstrap && dpkg-deb -x mmdebstrap_*.deb tool &&
    guest_sources | perl tool/usr/bin/mmdebstrap --mode=root --variant=minbase --format=directory \
      --include="${debian_packages[*]}" --aptopt='APT::Install-Recommends "false"' \
      --customize-hook='chroot "$1" useradd --create-home --shell /bin/bash user' "$debian_release" root -) \
    >"$directory/log" 2>&1 || die "a Debian of $debian_release cannot be made; see $directory/log"
  (cd "$directory/root" && rm -rf "${debian_left_out[@]}" && find . | cpio --quiet -o -H newc) >"$directory/root.cpio"
  rm -rf "$directory"/{root,tool,mmdebstrap_*.deb}
  printf '%s\n' "$stamp" >"$directory/stamp"
}

# add_unit ROOT: the VM's command as a unit of systemd, which is the first program then.
add_unit() {
  local units=$1/etc/systemd/system
  mkdir -p "$units/multi-user.target.wants"
  : >"$1/vm/systemd"
  printf '%s\n' '[Unit]' 'After=multi-user.target' '[Service]' Type=oneshot ExecStart=/init >"$units/vm-command.service"
  ln -s ../vm-command.service "$units/multi-user.target.wants/"
}
