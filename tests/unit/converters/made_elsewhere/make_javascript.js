// Make the JavaScript files. Run: node make_javascript.js DIRECTORY
const fs = require("fs");
const path = require("path");
const folder = process.argv[2];
fs.mkdirSync(folder, { recursive: true });
const rows = [
  { id: "quotes", text: 'He said "hi", and left\\', n: 1 },
  { id: "lines", text: "two\nlines\u2028three\u0085four\u0000end", n: 1.5 },
  { id: "emoji", text: "ümlaut € 😀", n: -0 },
  { id: "half", text: "half \ud83d pair", n: 1e21 },
  { id: "numbers", text: "x", n: Number.MAX_SAFE_INTEGER, small: 5e-324, big: Number.MAX_VALUE },
  { id: "none", text: "y", n: NaN, gone: undefined, f() {}, list: [undefined, Infinity, null] },
  { id: "kinds", text: "z", n: true, when: new Date(Date.UTC(2026, 0, 2, 3, 4, 5)), map: new Map([[1, 2]]),
    typed: new Uint8Array([1, 2]), bytes: Buffer.from("hi"), re: /x/, boxed: new String("s") },
  { id: "keys", text: "w", n: 0, "": 1, __proto__x: 2, "a.b": { c: [3] }, 2: "two", 1: "one" },
];
fs.writeFileSync(path.join(folder, "compact.json"), JSON.stringify(rows));
fs.writeFileSync(path.join(folder, "indented.json"), JSON.stringify(rows, null, "\t"));
fs.writeFileSync(path.join(folder, "utf16.json"), "\ufeff" + JSON.stringify(rows), "utf16le");
fs.writeFileSync(path.join(folder, "lines.jsonl"), rows.map((row) => JSON.stringify(row)).join("\r\n"));
// What node itself reads back, each text as code units so that half a pair is seen.
const units = (text) => Array.from({ length: text.length }, (_, at) => text.charCodeAt(at));
const read = JSON.parse(JSON.stringify(rows)).map((row) => ({ ...row, text: units(row.text) }));
fs.writeFileSync(path.join(folder, "read_back.json"), JSON.stringify(read, null, 1) + "\n");
