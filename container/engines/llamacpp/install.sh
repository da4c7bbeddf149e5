# Runs inside the image during the build; $1 is apt's command to install packages.
# Debian has llama.cpp as a package; the official image has it in /app.
if [ ! -x /app/llama-server ]; then
    $1 llama.cpp-tools
fi
