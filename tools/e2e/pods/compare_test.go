package pods

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// differs is a difference between the kubelet's record and ours that is right as
// it is, and why.
type differs struct {
	// aspect and value match what one side has and the other has not; an empty
	// value matches all.
	aspect, value string
	why           string
}

// passing are states that either may not show, because both report the newest
// state only, and these last for milliseconds.
var passing = []differs{
	{aspect: "^event .* Unhealthy .* errored and resulted in unknown state: rpc error: ", why: "a probe that begins while its container ends"},
}

// oneByOne is for pods with several containers that change at about the same
// time: one status may tell of one of them or of all.
var oneByOne = []differs{
	{aspect: "condition (Containers)?Ready$", value: `^False \(ContainersNotReady: `, why: "which containers have changed already"},
	{aspect: "container ", value: "^running, started=true", why: "started, and ready a moment later"},
}

// notYetOpen is for probes of a port that a container opens a moment after its start.
var notYetOpen = []differs{{aspect: "Unhealthy .* (connection refused|i/o timeout)$", why: "when a probe meets a container whose port is not open yet"}}

// compare says in which aspects two histories differ, but for what is allowed.
// Both must have the same values in the same order.
func compare(stock, edge map[string][]string, allowed []differs) []string {
	var out []string
	all := map[string]bool{}
	for _, h := range []map[string][]string{stock, edge} {
		for a := range h {
			all[a] = true
		}
	}
	for _, a := range slices.Sorted(maps.Keys(all)) {
		onlyStock, onlyEdge := onlyIn(stock[a], edge[a])
		for _, d := range slices.Concat(passing, allowed) {
			if !regexp.MustCompile(d.aspect).MatchString(a) {
				continue
			}
			value := regexp.MustCompile(d.value)
			onlyStock = slices.DeleteFunc(onlyStock, value.MatchString)
			onlyEdge = slices.DeleteFunc(onlyEdge, value.MatchString)
		}
		if len(onlyStock)+len(onlyEdge) > 0 {
			out = append(out, fmt.Sprintf("%s\n  only the kubelet: %s\n  only the agent:   %s", a, strings.Join(onlyStock, "\n                    "), strings.Join(onlyEdge, "\n                    ")))
		}
	}
	return out
}

// onlyIn are the elements of two lists that are in no longest list common to both.
func onlyIn(a, b []string) (onlyA, onlyB []string) {
	// common[i][j] is the length of that of a[i:] and b[j:].
	common := make([][]int, len(a)+1)
	for i := range common {
		common[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	i, j := 0, 0
	for i < len(a) && j < len(b) {
		switch {
		case a[i] == b[j]:
			i, j = i+1, j+1
		case common[i+1][j] >= common[i][j+1]:
			onlyA = append(onlyA, a[i])
			i++
		default:
			onlyB = append(onlyB, b[j])
			j++
		}
	}
	return append(onlyA, a[i:]...), append(onlyB, b[j:]...)
}

func TestCompare(t *testing.T) {
	stock := map[string][]string{"a phase": {"Pending", "Running", "Failed"}, "event a Normal Pulled: x": {"seen"}}
	for name, tc := range map[string]struct {
		edge    map[string][]string
		allowed []differs
		want    []string // in the one difference; none where it is empty
	}{
		"same":          {edge: stock},
		"a state less":  {edge: map[string][]string{"a phase": {"Pending", "Failed"}, "event a Normal Pulled: x": {"seen"}}, want: []string{"a phase", "only the kubelet: Running\n"}},
		"a state more":  {edge: map[string][]string{"a phase": {"Pending", "Running", "Unknown", "Failed"}, "event a Normal Pulled: x": {"seen"}}, want: []string{"a phase", "only the agent:   Unknown"}},
		"another order": {edge: map[string][]string{"a phase": {"Running", "Pending", "Failed"}, "event a Normal Pulled: x": {"seen"}}, want: []string{"a phase"}},
		"no event":      {edge: map[string][]string{"a phase": {"Pending", "Running", "Failed"}}, want: []string{"event a Normal Pulled"}},
		"another event": {edge: map[string][]string{"a phase": {"Pending", "Running", "Failed"}, "event a Normal Pulled: x": {"seen"}, "event a Normal Pulled: y": {"seen"}}, want: []string{"Pulled: y"}},
		"allowed":       {edge: map[string][]string{"a phase": {"Pending", "Failed"}, "event a Normal Pulled: x": {"seen"}}, allowed: []differs{{aspect: "^a phase$", value: "^Running$"}}},
		"allowed elsewhere": {
			edge:    map[string][]string{"a phase": {"Pending", "Failed"}, "event a Normal Pulled: x": {"seen"}},
			allowed: []differs{{aspect: "^b phase$", value: "^Running$"}}, want: []string{"a phase"},
		},
	} {
		got := compare(stock, tc.edge, tc.allowed)
		if len(tc.want) == 0 {
			if len(got) > 0 {
				t.Errorf("%s: %q; want no difference", name, got)
			}
			continue
		}
		if len(got) != 1 {
			t.Errorf("%s: %q; want one difference", name, got)
			continue
		}
		for _, w := range tc.want {
			if !strings.Contains(got[0]+"\n", w) {
				t.Errorf("%s: %q does not say %q", name, got[0], w)
			}
		}
	}
}
