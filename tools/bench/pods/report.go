package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/fairlead-io/fairlead/tools/bench/machine"
)

// report is what a whole run found.
type report struct {
	Machine machine.Machine `json:"machine"`
	Date    string          `json:"date"`
	Others  float64         `json:"others"` // cores that other programs used before it began
	Figures []figure        `json:"figures"`
	Failed  []string        `json:"failed,omitempty"` // what could not be measured, and why
}

// figure is one figure: ours, and the kubelet's where it has one.
type figure struct {
	Name    string   `json:"name"`
	Unit    string   `json:"unit"`
	Ours    float64  `json:"ours"`
	Kubelet *float64 `json:"kubelet,omitempty"`
	// Bounds are the issue's; 0 where there is none: of our value, and of its ratio
	// to the kubelet's.
	Bound      float64 `json:"bound,omitempty"`
	RatioBound float64 `json:"ratio_bound,omitempty"`
	Detail     string  `json:"detail,omitempty"`
}

func (r *report) add(f figure) {
	r.Figures = append(r.Figures, f)
	say("  %s", f)
}

func (f figure) String() string {
	s := fmt.Sprintf("%-44s %8.4g %-6s", f.Name, f.Ours, f.Unit)
	if f.Bound > 0 {
		s += fmt.Sprintf(" bound %g %s", f.Bound, met(f.Ours <= f.Bound))
	}
	if f.Kubelet != nil {
		ratio := f.Ours / *f.Kubelet
		s += fmt.Sprintf(" kubelet %.4g, ratio %.2f", *f.Kubelet, ratio)
		if f.RatioBound > 0 {
			s += fmt.Sprintf(" bound %g %s", f.RatioBound, met(ratio <= f.RatioBound))
		}
	}
	if f.Detail != "" {
		s += "  " + f.Detail
	}
	return s
}

func met(ok bool) string {
	if ok {
		return "met"
	}
	return "MISSED"
}

func (r report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, %s; other programs used %.2f cores before it began\n", r.Machine, r.Date, r.Others)
	for _, f := range r.Figures {
		fmt.Fprintln(&b, f)
	}
	for _, f := range r.Failed {
		fmt.Fprintln(&b, "FAILED", f)
	}
	return b.String()
}

// median in seconds; of an even number the mean of the middle two.
func median(d []time.Duration) float64 {
	d = slices.Clone(d)
	slices.Sort(d)
	n := len(d)
	return (d[(n-1)/2] + d[n/2]).Seconds() / 2
}

func extremes(d []time.Duration) string {
	return fmt.Sprintf("%.2f to %.2f s", slices.Min(d).Seconds(), slices.Max(d).Seconds())
}
