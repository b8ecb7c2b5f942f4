#!/bin/sh
# Installs agent-chat for this user: a private virtual environment and one launcher, nothing
# outside ~/.local. Where Debian's Python cannot make environments, python3-venv is installed
# first, as root or with sudo. Every line of work is inside a function and the last line calls
# the first of them, so that a download cut off anywhere does nothing.
#
#     sh install.sh                     from the folder this file lies in; again = upgrade
#     curl -fsSL http://HUB:9420/install.sh | sh              from a running hub
#     sh install.sh install http://HUB:9420                   the same, by name
#     sh install.sh uninstall           takes out what init wrote; messages in ~/.agent-chat stay
#     sh install.sh test [pytest args]  test tools in an environment of their own, then the tests
#     sh install.sh test -m 'not browser and not load and not install'       the quick part of them
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
    scrap=""
    dots=""
    # This machine is never asked for through a proxy, whatever http_proxy says.
    no_proxy="127.0.0.1,localhost,::1,${no_proxy:-${NO_PROXY:-}}"
    NO_PROXY="$no_proxy"
    export no_proxy NO_PROXY
    trap tidy EXIT
    trap 'exit 130' INT TERM
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

tidy() {
    if [ -n "$dots" ]; then kill "$dots" 2>/dev/null || true; fi
    if [ -n "$scrap" ]; then rm -rf -- "$scrap"; fi
}

# A command that takes its time; on a terminal, dots show that it is at work.
patiently() {
    if [ -t 2 ]; then
        while sleep 1; do printf . >&2; done &
        dots=$!
    fi
    "$@"
    if [ -n "$dots" ]; then
        kill "$dots" 2>/dev/null || true
        dots=""
        printf '\n' >&2
    fi
}

have() { command -v "$1" >/dev/null 2>&1; }

install_all() {
    if [ -e "$launcher" ] && ! grep -q "agent_chat" "$launcher"; then
        die "$launcher is something else; move it away first"
    fi
    fresh="$base/incoming"
    rm -rf -- "$fresh"
    scrap="$fresh"
    mkdir -p -- "$fresh"
    if [ -n "$1" ]; then
        say "1/4 fetching the program from ${1%/}"
        fetch_from "${1%/}"
    else
        say "1/4 copying the program"
        [ -f "$folder/agent_chat.py" ] || die "there is no agent_chat.py beside this file;" \
            "give the address of a hub: sh install.sh install http://HUB:9420"
        for file in agent_chat.py agent_chat_web.html install.sh; do
            if [ -f "$folder/$file" ]; then cp -- "$folder/$file" "$fresh/$file"; fi
        done
    fi
    say "2/4 making a Python environment in $base"
    need_python
    patiently make_environment "$base/venv"
    requirements >"$fresh/requirements.txt"
    say "3/4 installing its packages: $(requirements | tr '\n' ' ')"
    patiently add_packages "$base/venv" -r "$fresh/requirements.txt"
    say "4/4 putting it in place"
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
    download "$1/health" "$fresh/health" || explain "$1"
    download "$1/agent_chat.py" "$fresh/agent_chat.py" || explain "$1"
    told=$(sed -n 's/.*"fingerprint": *"\([0-9a-f]*\)".*/\1/p' "$fresh/health")
    found=$(digest "$fresh/agent_chat.py" | cut -c1-12)
    [ "${told:-none}" = "$found" ] ||
        die "the file from $1 has fingerprint $found, the hub says '$told'; nothing was installed"
    download "$1/" "$fresh/agent_chat_web.html" || true
    grep -qi '<!doctype html' "$fresh/agent_chat_web.html" 2>/dev/null ||
        rm -f -- "$fresh/agent_chat_web.html"
    if download "$1/install.sh" "$fresh/served"; then
        sed 's/^HUB_URL=.*/HUB_URL=""/' "$fresh/served" >"$fresh/install.sh"
    fi
}

# The body of a good answer goes into $2. If there is none, `refusal` is what was answered
# instead, "" if nobody answered.
download() {
    refusal=""
    if have curl; then
        code=$(curl -sS --noproxy "$no_proxy" --max-time 60 -o "$2" -w '%{http_code}' "$1") ||
            return 1
        [ "$code" != 200 ] || return 0
        refusal=$(said_in "$2")
        refusal="${refusal:-it answers $code, and not as a hub does}"
    elif have wget; then
        ! wget -q -T 60 -O "$2" "$1" || return 0
        wget -q -T 60 --content-on-error -O "$2" "$1" 2>/dev/null || true
        refusal=$(said_in "$2")
    else
        die "curl or wget is needed"
    fi
    return 1
}

# The sentence in an answer that says no.
said_in() {
    [ ! -f "$1" ] || sed -n 's/.*"error": *"\(.*\)".*/\1/p' "$1" | tr -d '[:cntrl:]' | cut -c1-300
}

# Ends with the reason why the last download failed.
explain() {
    [ -n "$refusal" ] || die "no hub answers at $1"
    case "$refusal" in
        *"answer to the name"*)
            say "if this is a forwarded port: it needs the same number at both ends," \
                "as in ssh -L 9420:127.0.0.1:9420" >&2
            ;;
    esac
    die "a hub is there, but refuses: $refusal"
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

# Where this is Debian and its Python cannot make environments, the package that can.
need_python() {
    if have uv || python3 -c "$new_enough; import ensurepip" 2>/dev/null; then return; fi
    have apt-get || return 0 # make_environment looks for other Pythons, and says what is missing
    system_packages python3-venv
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

new_enough='import sys; sys.version_info >= (3, 11) or sys.exit(1)'

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
        say "taking its entries out of your agents' configuration files"
        "$launcher" init --undo --yes ||
            say "not all could be taken out; the key agent-chat in them is ours"
        "$launcher" stop 2>/dev/null || true
        rm -f -- "$launcher"
    fi
    rm -rf -- "$base"
    say "removed $base and $launcher; messages and settings stay in $HOME/.agent-chat"
    say "where init --project wrote into a project, take the key agent-chat out by hand"
}

run_tests() {
    [ -f "$folder/test_agent_chat.py" ] || die "there is no test_agent_chat.py beside this file"
    missing=""
    have tmux || missing="tmux"
    have chromium || have google-chrome || missing="$missing chromium"
    have curl || have wget || missing="$missing curl"
    have faketime || missing="$missing faketime"
    have strace || missing="$missing strace"
    have screen || missing="$missing screen"
    have vim || missing="$missing vim"
    have nvim || missing="$missing neovim"
    have kitty || missing="$missing kitty"
    have Xvfb || missing="$missing xvfb"
    have uv || python3 -c 'import ensurepip' 2>/dev/null || missing="$missing python3-venv"
    # shellcheck disable=SC2086 # one word each
    [ -z "$missing" ] || system_packages $missing
    fresh="$folder"
    tools="${XDG_CACHE_HOME:-$HOME/.cache}/agent-chat/test-venv"
    patiently make_environment "$tools"
    say "installing the test tools into $tools"
    # shellcheck disable=SC2046 # one word each
    patiently add_packages "$tools" $(requirements) pytest pytest-timeout pytest-xdist hypothesis \
        playwright axe-playwright-python cmux mypy ruff
    cd -- "$folder"
    # Half of a test is waiting for a process or a clock: twice as many workers as the two
    # cores of a small machine.
    PATH="$tools/bin:$PATH" exec "$tools/bin/python" -m pytest -c .ci/pytest.ini --rootdir . \
        -n 4 --dist worksteal test_agent_chat.py "$@"
}

# Debian's packages, if this user may install them; it is said what happens.
system_packages() {
    if ! have apt-get; then
        say "not found: $*; what needs them will not work"
    elif [ "$(id -u)" = 0 ]; then
        say "installing with apt-get: $*"
        patiently install_packages "" "$@"
    elif have sudo; then
        say "using sudo to install with apt-get: $* (Ctrl-C to stop)"
        install_packages sudo "$@"
    else
        say "not found: $*; what needs them will not work"
    fi
}

install_packages() {
    as=$1
    shift
    $as apt-get update -qq
    $as env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@" >/dev/null
}

{ main "$@"; }
