package main

import (
	"strings"
	"testing"
	"time"
)

func TestFigure(t *testing.T) {
	theirs := 0.5
	for _, tc := range []struct {
		figure
		want, not string
	}{
		{figure{Name: "a", Ours: 0.3, Kubelet: &theirs, RatioBound: 0.8}, "ratio 0.60 bound 0.8 met", "MISSED"},
		{figure{Name: "a", Ours: 0.45, Kubelet: &theirs, RatioBound: 0.8}, "ratio 0.90 bound 0.8 MISSED", " met"},
		{figure{Name: "a", Ours: 43, Bound: 42}, "bound 42 MISSED", "kubelet"},
		{figure{Name: "a", Ours: 42, Bound: 42}, "bound 42 met", "MISSED"},
		{figure{Name: "a", Ours: 1, Kubelet: &theirs}, "ratio 2.00", "bound"},
	} {
		if got := tc.String(); !strings.Contains(got, tc.want) || strings.Contains(got, tc.not) {
			t.Errorf("%q; want %q and not %q", got, tc.want, tc.not)
		}
	}
}

func TestMedian(t *testing.T) {
	d := []time.Duration{3 * time.Second, time.Second, 2 * time.Second}
	if got := median(d); got != 2 {
		t.Errorf("median of three: %g, want 2", got)
	}
	if got := median(append(d, 6*time.Second)); got != 2.5 {
		t.Errorf("median of four: %g, want 2.5", got)
	}
	if got := extremes(d); got != "1.00 to 3.00 s" {
		t.Errorf("extremes: %s", got)
	}
}
