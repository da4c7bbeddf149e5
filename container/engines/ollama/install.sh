# Runs inside the image during the build; $1 is apt's command to install packages.
# The Debian base brings Ollama in an archive: the CPU build, or an official one.
if [ -e /opt/aiflux/engine.tar ]; then
    tar -C /usr --no-same-owner -xf /opt/aiflux/engine.tar
fi
