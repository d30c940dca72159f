package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/fairlead-io/fairlead/tools/bench/machine"
)

// report is what a whole run found.
type report struct {
	Machine   machine.Machine `json:"machine"`
	Date      string          `json:"date"`
	Mosquitto string          `json:"mosquitto,omitempty"` // version
	Figures   []figure        `json:"figures"`
	Failed    []string        `json:"failed,omitempty"` // what could not be measured, and why
}

// figure is one figure: a value per run, ours beside mosquitto's of the same
// pair where it is a comparison.
type figure struct {
	Name   string    `json:"name"`
	Unit   string    `json:"unit"`
	Ours   []float64 `json:"ours"`
	Theirs []float64 `json:"mosquitto,omitempty"`
	Ratios []float64 `json:"ratios,omitempty"` // ours / mosquitto, per pair
	Median float64   `json:"median"`           // of what the bound is on: see Bound
	Bound  *bound    `json:"bound,omitempty"`
	Met    *bool     `json:"met,omitempty"` // nil where there is no bound, or nobody to compare with
	// Void says why the bound is not met whatever the numbers are.
	Void   string `json:"void,omitempty"`
	Detail string `json:"detail,omitempty"`
}

// bound is the issue's: "≥" or "≤" of the ratio to mosquitto, of the difference
// to it, or of our own value.
type bound struct {
	Of    string  `json:"of"` // ratio, difference, value
	Least bool    `json:"at_least"`
	Value float64 `json:"value"`
}

func (b bound) String() string {
	op := "≤"
	if b.Least {
		op = "≥"
	}
	switch b.Of {
	case "ratio":
		return fmt.Sprintf("%s %g × mosquitto", op, b.Value)
	case "difference":
		return fmt.Sprintf("%s mosquitto + %g", op, b.Value)
	default:
		return fmt.Sprintf("%s %g", op, b.Value)
	}
}

func ratio(least bool, v float64) *bound { return &bound{"ratio", least, v} }
func atMost(v float64) *bound            { return &bound{"value", false, v} }
func atLeast(v float64) *bound           { return &bound{"value", true, v} }

// add settles a figure and tells it.
func (r *report) add(f figure) {
	for i := range min(len(f.Ours), len(f.Theirs)) {
		f.Ratios = append(f.Ratios, f.Ours[i]/f.Theirs[i])
	}
	compared := len(f.Theirs) > 0
	of := "value"
	if f.Bound != nil {
		of = f.Bound.Of
	} else if compared {
		of = "ratio"
	}
	switch of {
	case "ratio":
		f.Median = median(f.Ratios)
	case "difference":
		var d []float64
		for i := range f.Theirs {
			d = append(d, f.Ours[i]-f.Theirs[i])
		}
		f.Median = median(d)
	default:
		f.Median = median(f.Ours)
	}
	if f.Bound != nil && (compared || of == "value") {
		met := f.Median <= f.Bound.Value
		if f.Bound.Least {
			met = f.Median >= f.Bound.Value
		}
		met = met && f.Void == ""
		f.Met = &met
	}
	r.Figures = append(r.Figures, f)
	say("  %s", f)
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	if n := len(v); n%2 == 0 {
		return (v[n/2-1] + v[n/2]) / 2
	}
	return v[len(v)/2]
}

// number writes four digits, without an exponent.
func number(v float64) string {
	if v >= 1000 || v <= -1000 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.4g", v)
}

func numbers(v []float64) string {
	s := make([]string, len(v))
	for i, x := range v {
		s[i] = number(x)
	}
	return strings.Join(s, " ")
}

func (f figure) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "%-52s ours %s %s", f.Name, numbers(f.Ours), f.Unit)
	if len(f.Theirs) > 0 {
		fmt.Fprintf(&s, " | mosquitto %s", numbers(f.Theirs))
		r := make([]string, len(f.Ratios))
		for i, x := range f.Ratios {
			r[i] = fmt.Sprintf("%.2f", x)
		}
		fmt.Fprintf(&s, " | ratio %s", strings.Join(r, " "))
	}
	what := "median"
	if f.Bound != nil && f.Bound.Of == "difference" {
		what = "median difference"
	}
	fmt.Fprintf(&s, " | %s %.4g", what, f.Median)
	if f.Bound != nil {
		verdict := "nothing to compare with"
		if f.Met != nil {
			switch {
			case *f.Met:
				verdict = "met"
			case f.Void != "":
				verdict = "NOT MET, " + f.Void
			default:
				verdict = "NOT MET"
			}
		}
		fmt.Fprintf(&s, " | bound %s: %s", f.Bound, verdict)
	}
	if f.Detail != "" {
		fmt.Fprintf(&s, "\n      %s", f.Detail)
	}
	return s.String()
}

func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "%s, %s, mosquitto %s\n", r.Machine, r.Date, r.Mosquitto)
	for _, f := range r.Figures {
		fmt.Fprintln(w, f)
	}
	for _, f := range r.Failed {
		fmt.Fprintln(w, "FAILED", f)
	}
}
