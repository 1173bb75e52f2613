#!/usr/bin/env bash
# An AArch64 Python with numpy and pytest, for the tests under qemu: Debian's packages of the release that runs
# here, unpacked into FOLDER/root without a change to the system, and wheels in FOLDER/site.
#
#   tools/arm_root.sh FOLDER PYTHON     PYTHON: of this machine, whose pip takes the wheels
#
# FOLDER/root/usr/bin/python runs it; so do the processes that it starts.
set -euo pipefail

folder=$(realpath -m "$1")
python=$2
root=$folder/root
apt=$folder/apt

fail() {
  echo "arm_root.sh: $*" >&2
  exit 1
}

for tool in apt-get dpkg qemu-aarch64; do
  command -v "$tool" >/dev/null || fail "needs $tool: this works on Debian, with the package qemu-user"
done

rm -rf "$folder"
mkdir -p "$root" "$apt"/{lists,cache/archives}/partial
: >"$apt/status"
# The package sources are those of the system, everything that apt writes is here.
cat >"$apt/conf" <<END
APT::Architecture "arm64";
APT::Architectures "arm64";
APT::Sandbox::User "$(id -un)";
APT::Keep-Downloaded-Packages "true";
APT::Update::Post-Invoke "";
Dir::State "$apt";
Dir::State::lists "$apt/lists";
Dir::State::status "$apt/status";
Dir::Cache "$apt/cache";
Acquire::Retries "1";
END
export APT_CONFIG=$apt/conf
{
  apt-get update --error-on=any &&
    apt-get install -y --download-only --no-install-recommends python3 libpython3-dev libstdc++6 libgomp1
} >"$apt/log" 2>&1 || fail "no AArch64 packages (is there a network?): $(grep '^[EW]:' "$apt/log" | head -n 2)"
for package in "$apt"/cache/archives/*.deb; do dpkg -x "$package" "$root"; done

# Under a path of its own as argv[0], so that sys.executable is what starts another one, and sys.prefix this root.
name=$(basename "$(readlink -f "$root"/usr/bin/python3.[0-9]*[0-9] | head -n 1)")
[[ -n $name ]] || fail "no python3 among the packages of this release"
cat >"$root/usr/bin/python" <<END
#!/bin/sh
export QEMU_LD_PREFIX='$root'
exec qemu-aarch64 -0 '$root/usr/bin/python' '$root/usr/bin/$name' "\$@"
END
chmod +x "$root/usr/bin/python"
"$root/usr/bin/python" -c 'import platform; assert platform.machine() == "aarch64"'

# glibc 2.28 is older than that of every release whose compilers pared builds with; pip wants each tag named.
"$python" -m pip --disable-pip-version-check install --quiet --constraint "$(dirname "$0")/../constraints.txt" \
  --target "$folder/site" --platform manylinux_2_28_aarch64 --platform manylinux_2_17_aarch64 --only-binary :all: \
  --python-version "${name#python}" --implementation cp numpy pytest pytest-xdist hypothesis ||
  fail "no AArch64 wheels (is there a network?)"
rm -rf "$apt"
