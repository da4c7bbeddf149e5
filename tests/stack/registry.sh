#!/usr/bin/env bash
# A container registry on loopback, for pushing and pulling models.
set -euo pipefail
# shellcheck source=tests/stack/lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"

registry_dir=$stack_dir/registry

# Ollama reads a blob's address from the Location header, with which its own registry redirects; "#"
# means the requested address. If the registry sets a Location itself, as for an upload, that one is
# sent.
render_config() {
    cat <<CONF
version: 0.1
log:
  level: warn
storage:
  filesystem:
    rootdirectory: $registry_dir/data
  delete:
    enabled: true
http:
  addr: 127.0.0.1:$1
  headers:
    Location: ["#"]
CONF
}

answers() {
    curl -fsS -m 3 --noproxy '*' -o /dev/null "http://127.0.0.1:$1/v2/" 2>/dev/null
}

up() {
    local port
    apt_install docker-registry curl iproute2
    port=$(remembered_port registry 15000)
    install -d -m 0755 "$registry_dir"
    install -d -m 0755 -o "$stack_user" -g "$stack_user" "$registry_dir/data"
    if render_config "$port" | replace_if_changed "$registry_dir/config.yml"; then stop_daemon registry; fi
    ensure_daemon registry "$stack_user" /usr/bin/docker-registry serve "$registry_dir/config.yml"
    wait_until 10 answers "$port" || fail "the registry does not respond on port $port: $(tail -n 2 "$log_dir/registry.log")"
    status
}

status() {
    local port
    daemon_pid registry >/dev/null || fail "the registry is not running"
    port=$(remembered_port registry 15000)
    answers "$port" || fail "the registry does not respond on port $port"
    say "127.0.0.1:$port"
}

down() {
    stop_daemon registry
}

"$1"
