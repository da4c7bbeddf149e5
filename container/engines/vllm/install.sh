# Runs inside the image during the build; $1 is apt's command to install packages.
# The Debian base brings the CPU build in an archive; it has a directory and a Python path of its own.
if [ -e /opt/aiflux/engine.tar ]; then
    $1 libnuma1 python3.11
    mkdir /opt/vllm
    tar -C /opt/vllm --no-same-owner -xf /opt/aiflux/engine.tar
    ln -s /opt/vllm/bin/vllm /usr/local/bin/vllm
    if [ ! -d /opt/vllm/lib/vllm/__pycache__ ]; then
        # Status 1: a few files are templates, not Python.
        python3.11 -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/vllm/lib >/dev/null 2>&1 || :
    fi
fi
