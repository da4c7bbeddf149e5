# Make the R files. Run: Rscript make_r.R DIRECTORY
folder <- commandArgs(trailingOnly = TRUE)[1]
dir.create(folder, showWarnings = FALSE)
at <- function(name) file.path(folder, name)
frame <- data.frame(
  text = c("He said \"hi\", and left", "two\nlines; \u00fcmlaut \u20ac", "", NA, "tab\there | pipe\\"),
  when = as.Date(c("2026-01-02", NA, "1999-12-31", "2026-06-07", NA)),
  score = c(1.5, NaN, 1e10, Inf, -0.25),
  done = c(TRUE, NA, FALSE, TRUE, FALSE),
  label = factor(c("a", "b", NA, "a", "c"))
)
options(encoding = "UTF-8")
write.csv(frame, at("write.csv"))
write.csv(frame, at("write_plain.csv"), row.names = FALSE, na = "")
write.csv2(frame, at("write2.csv"))
write.table(frame, at("table.txt"))
write.table(frame, at("table.tsv"), sep = "\t", qmethod = "double")
write.table(frame[c(1, 3), c("when", "score", "label")], at("table_bare.tsv"), sep = "\t", quote = FALSE)
write.csv(frame, at("latin1.csv"), fileEncoding = "CP1252")
write.table(frame, at("table_double.txt"), qmethod = "double")
write.table(frame["label"], at("table_one.txt"), qmethod = "double")
