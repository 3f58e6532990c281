#!/usr/bin/env bash
# A line of a table: what a variant's times come to, beside those of runc's shim. Sourced by the benches.

row() { # VARIANT TIMES REFERENCE: file of microseconds, one a line; file that keeps the median of runc-shim, the first
  sort -n "$2" | awk -v name="$1" -v reference="$3" '
    { times[NR] = $1 / 1000 }
    END {
      median = times[int((NR + 1) / 2)]
      if (name == "runc-shim") { print median >reference; base = median } else { getline base <reference }
      printf "    %-22s median %7.1f ms   quartiles %7.1f - %7.1f ms   ratio %.2f\n",
        name, median, times[int((NR + 3) / 4)], times[int((3 * NR + 3) / 4)], median / base
    }'
}
