package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"
	"time"
)

// table prints rows under their headings. Without rows it says so, to stderr.
func (a *app) table(none string, headings []string, rows [][]string) error {
	if len(rows) == 0 {
		fmt.Fprintln(a.errOut, none)
		return nil
	}
	w := tabwriter.NewWriter(a.out, 0, 8, 3, ' ', 0)
	for _, r := range append([][]string{headings}, rows...) {
		fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	return w.Flush()
}

// json prints a value, indented: the listings.
func (a *app) json(v any) error {
	e := json.NewEncoder(a.out)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// line prints a value on one line: what follows live.
func (a *app) line(v any) error {
	e := json.NewEncoder(a.out)
	e.SetEscapeHTML(false)
	return e.Encode(v)
}

// age is how long ago a time was, "-" for never.
func (a *app) age(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return span(a.now().Sub(t))
}

// span writes a duration with about two digits. A negative one is a clock that
// runs ahead of ours.
func span(d time.Duration) string {
	if d < 0 {
		if d > -time.Second {
			return "0s"
		}
		return "-" + span(-d)
	}
	switch {
	case d < time.Second:
		return fmt.Sprintf("%dms", d.Milliseconds())
	case d < 10*time.Second:
		return fmt.Sprintf("%.1fs", d.Seconds())
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	default:
		return fmt.Sprintf("%dd", int(d.Hours()/24))
	}
}

// clock is a time of the day with milliseconds.
func (a *app) clock(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.In(a.now().Location()).Format("15:04:05.000")
}

// millis is a payload's time; zero where there is none.
func millis(ms int64) time.Time {
	if ms <= 0 {
		return time.Time{}
	}
	return time.UnixMilli(ms).UTC()
}

func or(s, none string) string {
	if s == "" {
		return none
	}
	return s
}

// shown is a JSON value as a person reads it: a text without its quotes.
func shown(raw json.RawMessage) string {
	if len(raw) == 0 || string(raw) == "null" {
		return "-"
	}
	var s string
	if json.Unmarshal(raw, &s) == nil {
		if strings.ContainsAny(s, "\t\n\r\x1b") || s == "" || s == "-" {
			return string(raw)
		}
		return s
	}
	return string(raw)
}

// size is a number of bytes.
func size(n int) string {
	switch {
	case n < 1000:
		return fmt.Sprintf("%d B", n)
	case n < 1_000_000:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	default:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	}
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// note tells a person something beside the output.
func (a *app) note(format string, args ...any) {
	fmt.Fprintf(a.errOut, "fairlead: "+format+"\n", args...)
}
