#!/bin/sh
# Installs agent-chat for this user: a private virtual environment and one launcher. No root,
# nothing outside ~/.local. Every line of work is inside a function and the last line calls
# the first of them, so that a download cut off anywhere does nothing.
#
#     sh install.sh                     from the folder this file lies in; again = upgrade
#     curl -fsSL http://HUB:9420/install.sh | sh              from a running hub
#     sh install.sh install http://HUB:9420                   the same, by name
#     sh install.sh uninstall           messages in ~/.agent-chat stay
#     sh install.sh test [pytest args]  test tools in an environment of their own, then the tests
HUB_URL=""

main() {
    set -eu
    umask 077
    case "${HOME:-}" in
        /*) ;;
        *) die "HOME is not set to a directory" ;;
    esac
    case "$HOME" in *\'*) die "a home directory with a quote in its name is not supported" ;; esac
    base="$HOME/.local/share/agent-chat"
    launcher="$HOME/.local/bin/agent-chat"
    folder=$(dirname -- "$0")
    case "${1:-install}" in
        install) install_all "${2:-$HUB_URL}" ;;
        uninstall) uninstall_all ;;
        test) shift && run_tests "$@" ;;
        *) die "use: sh install.sh [install [HUB_URL] | uninstall | test [pytest arguments]]" ;;
    esac
}

say() { printf '%s\n' "agent-chat: $*"; }

die() {
    printf '%s\n' "agent-chat: $*" >&2
    exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

install_all() {
    if [ -e "$launcher" ] && ! grep -q "agent_chat" "$launcher"; then
        die "$launcher is something else; move it away first"
    fi
    fresh="$base/incoming"
    rm -rf -- "$fresh"
    mkdir -p -- "$fresh"
    trap 'rm -rf -- "$fresh"' EXIT
    trap 'exit 130' INT TERM
    if [ -n "$1" ]; then
        fetch_from "${1%/}"
    else
        [ -f "$folder/agent_chat.py" ] || die "there is no agent_chat.py beside this file;" \
            "give the address of a hub: sh install.sh install http://HUB:9420"
        for file in agent_chat.py agent_chat_web.html install.sh; do
            if [ -f "$folder/$file" ]; then cp -- "$folder/$file" "$fresh/$file"; fi
        done
    fi
    make_environment "$base/venv"
    requirements >"$fresh/requirements.txt"
    add_packages "$base/venv" -r "$fresh/requirements.txt"
    put_in_place
    version=$("$launcher" version) || die "the installed program does not start"
    say "installed $version as $launcher"
    case ":$PATH:" in
        *":$HOME/.local/bin:"*) ;;
        *) say "$HOME/.local/bin is not on your PATH; add it in your shell's start-up file" ;;
    esac
    say "a hub or an agent that is running keeps its old copy until it is restarted"
    say "next: agent-chat serve -d, agent-chat init, agent-chat doctor"
}

# What arrived is compared with the fingerprint that the hub gives of itself. That finds a
# damaged or mixed copy; it cannot find a hub that lies, so install only from one you trust.
fetch_from() {
    say "fetching from $1"
    download "$1/health" "$fresh/health" || die "no hub answers at $1"
    download "$1/agent_chat.py" "$fresh/agent_chat.py" || die "$1 does not hand out its source"
    told=$(sed -n 's/.*"fingerprint": *"\([0-9a-f]*\)".*/\1/p' "$fresh/health")
    found=$(digest "$fresh/agent_chat.py" | cut -c1-12)
    [ -n "$told" ] && [ "$told" = "$found" ] ||
        die "the file from $1 has fingerprint $found, the hub says '$told'; nothing was installed"
    download "$1/" "$fresh/agent_chat_web.html" || true
    grep -qi '<!doctype html' "$fresh/agent_chat_web.html" 2>/dev/null ||
        rm -f -- "$fresh/agent_chat_web.html"
    if download "$1/install.sh" "$fresh/served"; then
        sed 's/^HUB_URL=.*/HUB_URL=""/' "$fresh/served" >"$fresh/install.sh"
    fi
}

download() {
    if have curl; then
        curl -fsS --max-time 60 -o "$2" "$1"
    elif have wget; then
        wget -q -T 60 -O "$2" "$1"
    else
        die "curl or wget is needed"
    fi
}

digest() {
    if have sha256sum; then
        sha256sum "$1"
    elif have shasum; then
        shasum -a 256 "$1"
    else
        openssl dgst -sha256 -r "$1"
    fi
}

# The list stands once, in the PEP 723 header of the program.
requirements() {
    sed -n 's/^# dependencies = \[\(.*\)\]$/\1/p' "$fresh/agent_chat.py" | tr -d '"' | sed 's/, /\
/g'
}

make_environment() {
    if [ -x "$1/bin/python" ] && "$1/bin/python" -c "$new_enough" 2>/dev/null; then
        have uv || "$1/bin/python" -c 'import pip' 2>/dev/null && return
    fi
    rm -rf -- "$1"
    if have uv; then
        uv venv --quiet --python '>=3.11' "$1" || die "uv found no Python 3.11 or newer"
        return
    fi
    for python in python3 python3.14 python3.13 python3.12 python3.11 ""; do
        [ -n "$python" ] || die "Python 3.11 or newer is needed (or uv, which brings one)"
        if have "$python" && "$python" -c "$new_enough" 2>/dev/null; then break; fi
    done
    "$python" -c 'import ensurepip' 2>/dev/null ||
        die "this Python cannot make environments; on Debian: sudo apt install python3-venv"
    "$python" -m venv "$1"
}

new_enough='import sys; sys.exit(sys.version_info < (3, 11))'

add_packages() {
    environment="$1"
    shift
    if have uv; then
        uv pip install --quiet --upgrade --compile-bytecode \
            --python "$environment/bin/python" "$@"
    else
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
            --upgrade "$@"
    fi || die "the packages could not be installed"
}

# The program is imported, so that it runs from compiled bytecode: a script is compiled at each
# start, which costs 0.1 s. -I keeps PYTHON* variables and the current directory out of it.
put_in_place() {
    python="$base/venv/bin/python"
    modules=$("$python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    for file in agent_chat_web.html install.sh agent_chat.py; do
        rm -f -- "$modules/$file"
        if [ -f "$fresh/$file" ]; then mv -- "$fresh/$file" "$modules/$file"; fi
    done
    "$python" -I -m compileall -q "$modules/agent_chat.py" || die "the program is damaged"
    mkdir -p -- "$HOME/.local/bin"
    cat >"$fresh/launcher" <<END
#!/bin/sh
# made by agent-chat's install.sh
exec '$python' -I -c 'import agent_chat; raise SystemExit(agent_chat.main())' "\$@"
END
    chmod 700 "$fresh/launcher"
    mv -f -- "$fresh/launcher" "$launcher"
}

uninstall_all() {
    if [ -x "$launcher" ] && grep -q "agent_chat" "$launcher"; then
        "$launcher" stop 2>/dev/null || true
        rm -f -- "$launcher"
    fi
    rm -rf -- "$base"
    say "removed $base and $launcher; messages and settings stay in $HOME/.agent-chat"
    say "entries in the agents' configuration files are taken out by: agent-chat init --undo"
}

run_tests() {
    [ -f "$folder/test_agent_chat.py" ] || die "there is no test_agent_chat.py beside this file"
    system_packages
    fresh="$folder"
    tools="${XDG_CACHE_HOME:-$HOME/.cache}/agent-chat/test-venv"
    make_environment "$tools"
    # shellcheck disable=SC2046 # one word each
    add_packages "$tools" $(requirements) pytest pytest-timeout pytest-xdist hypothesis \
        playwright axe-playwright-python mypy ruff
    cd -- "$folder"
    PATH="$tools/bin:$PATH" exec "$tools/bin/python" -m pytest -c .ci/pytest.ini --rootdir . -n 2 \
        test_agent_chat.py "$@"
}

system_packages() {
    missing=""
    have tmux || missing="tmux"
    have chromium || have google-chrome || missing="$missing chromium"
    have curl || have wget || missing="$missing curl"
    have faketime || missing="$missing faketime"
    have strace || missing="$missing strace"
    have uv || python3 -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
    [ -n "$missing" ] || return 0
    if ! have apt-get; then
        say "not found:$missing; tests that need them are skipped"
    elif [ "$(id -u)" = 0 ]; then
        say "installing with apt-get:$missing"
        # shellcheck disable=SC2086 # one word each
        apt-get update -qq && apt-get install -y -qq $missing >/dev/null
    elif have sudo; then
        say "using sudo to install with apt-get:$missing (Ctrl-C to stop)"
        # shellcheck disable=SC2086
        sudo apt-get update -qq && sudo apt-get install -y -qq $missing >/dev/null
    else
        say "not found:$missing; tests that need them are skipped"
    fi
}

{ main "$@"; }
