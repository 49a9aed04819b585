# What 32-bit x86 programs need on a machine of 64 bits: a C library to be linked against and to run with. Sourced after
# common.sh and vm.sh.
#
# It comes from Debian's packages of the machine's own release, by the machine's own apt, extracted into .cache: nothing is
# installed. A program there is started by its own loader, by path.

narrow_target=i686-unknown-linux-gnu
narrow_directory=$cache/i386

# narrow_libraries: makes $narrow_directory/root, where it is not there.
narrow_libraries() {
  local root=$narrow_directory/root package
  [[ ! -e $narrow_directory/complete ]] || return 0
  have apt-get dpkg-deb gcc || die "32-bit libraries are taken from Debian's packages: apt-get, dpkg-deb and gcc are needed"
  rm -rf "$narrow_directory"
  mkdir -p "$root"
  (
    cd "$narrow_directory" &&
      apt-get download -o APT::Sandbox::User=root libc6-i386 libc6-dev-i386 lib32gcc-s1 "lib32gcc-$(gcc -dumpversion)-dev" &&
      for package in *.deb; do dpkg-deb -x "$package" root || exit; done
  ) >"$narrow_directory/log" 2>&1 || die "the 32-bit C library cannot be had; see $narrow_directory/log"
  # In the package it leads to the machine's.
  ln -sf ../lib32/ld-linux.so.2 "$root/lib/ld-linux.so.2"
  rm "$narrow_directory"/*.deb
  : >"$narrow_directory/complete"
}

# narrow_linker: prints what links 32-bit programs: gcc, told where everything is.
narrow_linker() {
  local root=$narrow_directory/root objects
  objects=$root/usr/lib/gcc/x86_64-linux-gnu/$(gcc -dumpversion)/32
  printf '#!/bin/sh\nexec gcc -m32 --sysroot="%s" -B"%s/" -B"%s/usr/lib32/" -L"%s" -L"%s/usr/lib32" "$@"\n' \
    "$root" "$objects" "$root" "$objects" "$root" >"$narrow_directory/gcc"
  chmod 755 "$narrow_directory/gcc"
  printf '%s\n' "$narrow_directory/gcc"
}

# narrow_build PROFILE PACKAGE...: builds packages for 32-bit programs, and prints the directory where they are.
narrow_build() {
  local profile=$1 linker
  shift
  [[ $(uname -m) == x86_64 ]] || die "32-bit programs are built on x86-64 alone"
  (flock 9 && narrow_libraries) 9>"$cache/i386.lock" || exit
  need_target "$narrow_target"
  linker=$(narrow_linker)
  CARGO_TARGET_I686_UNKNOWN_LINUX_GNU_LINKER=$linker \
    cargo build --quiet --manifest-path "$repo/Cargo.toml" --target-dir "$(target_dir)" --target "$narrow_target" \
    $([[ $profile == debug ]] || echo --release) "${@/#/--package=}" >&2 || die "what 32-bit programs need does not build"
  printf '%s\n' "$(target_dir)/$narrow_target/$profile"
}
