#!/bin/sh
# Make the LibreOffice files from text.fodt, lists.html and table.fods.
# Run: sh make_libreoffice.sh DIRECTORY
set -eu
here=$(dirname "$0")
mkdir -p "$1"
office() {
    soffice -env:UserInstallation="file://$(mktemp -d)" --headless --convert-to "$1" --outdir "$2" "$3" >&2
}
# An export filter's tokens: separator, quote, encoding (76 is UTF-8, 1 is Windows-1252), first row,
# columns, language, quote all texts, formatted as shown.
csv() {
    office "csv:Text - txt - csv (StarCalc):$2" "$1" "$here/table.fods"
    mv "$1/table.csv" "$1/$3"
}
office docx "$1" "$here/text.fodt"
csv "$1" 44,34,76,1,,0,false,true default.csv
csv "$1" 59,34,76,1,,0,true,false semicolon.csv
csv "$1" 9,34,76,1,,0,true,true tab.tsv
csv "$1" 44,34,1,1,,0,false,true windows.csv
soffice -env:UserInstallation="file://$(mktemp -d)" --headless --infilter="HTML (StarWriter)" \
    --convert-to "docx:MS Word 2007 XML" --outdir "$1" "$here/lists.html" >&2
# What LibreOffice itself reads in the DOCX files.
for name in text lists; do
    office "txt:Text (encoded):UTF8" "$1" "$1/$name.docx"
    mv "$1/$name.txt" "$1/${name}_read_back.txt"
done
