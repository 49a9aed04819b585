# What every script of tools/ shares. Sourced, never run.
#
# After sourcing, `repo` is the root of the clone and `cache` a directory in it that git ignores: what is downloaded
# or built outside Cargo lies there and may be deleted at any time.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cache=$repo/.cache
mkdir -p "$cache"

# What comes from outside the project (Linux's selftest, the reference VM); it may be missing.
shared=${UIOMMUFD_SHARED:-$repo/../shared}

# heading TEXT: one line that says what happens now.
heading() { printf '\n== %s\n' "$*"; }

# note TEXT: a line about the work itself, kept off stdout.
note() { printf '%s\n' "$*" >&2; }

# die TEXT: one sentence on stderr, exit 2.
die() {
  note "${0##*/}: $*"
  exit 2
}

# have COMMAND...: true when all of them are installed.
have() {
  local name
  for name; do command -v "$name" >/dev/null || return 1; done
}

# missing_packages PACKAGE...: those that dpkg does not know as installed.
missing_packages() {
  local package
  for package; do
    dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || printf '%s ' "$package"
  done
}

# need_packages PACKAGE...: installs what is missing, which needs root; otherwise says what to install.
need_packages() {
  local missing
  have apt-get dpkg-query || die "this script knows Debian's packages only; it needs: $*"
  missing=$(missing_packages "$@")
  [[ -n $missing ]] || return 0
  ((EUID == 0)) || die "please install as root: apt-get install $missing"
  note "installing $missing"
  # shellcheck disable=SC2086  # a list of words
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } \
    >"$cache/apt.log" 2>&1 || die "apt-get could not install $missing; see $cache/apt.log"
}

# need_rust: the toolchain of rust-toolchain.toml, through rustup.
need_rust() {
  have cargo || [[ ! -f $HOME/.cargo/env ]] || source "$HOME/.cargo/env"
  if ! have cargo && have rustup-init; then rustup-init -y -q --no-modify-path >&2 && source "$HOME/.cargo/env"; fi
  have cargo || die "Rust is missing: install it from https://rustup.rs and start this again"
  cargo --version >/dev/null 2>&1 || die "Rust $(rust_channel) is missing: rustup toolchain install $(rust_channel)"
}

rust_channel() { sed -n 's/^channel = "\(.*\)"/\1/p' "$repo/rust-toolchain.toml"; }

# target_dir: where Cargo puts what it builds.
target_dir() { printf '%s\n' "${CARGO_TARGET_DIR:-$repo/target}"; }
