package topic_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/fairlead-io/fairlead/schemas/topic"
)

var fuzzFilters = []string{
	"#", "+", "/", "a", "a/b", "+/b", "a/+", "+/+", "a/#", "+/#", "/#", "/+", "+/", "a/+/c", "a/+/#", "a//b", "a//#", "+//+",
	"$SYS/#", "$SYS/+", "$x", "$x/#", "+/x/#", "é/+/ü", " ", "a/b/c/d/e/f/g/#", "fl/+/reported/#", "+/+/+", "a/", "//", "//#", "/+/#",
}

// witnesses are topics that g selects, with a level in the place of its
// wildcards that no literal of f equals. f covers g just if it selects them all:
// whatever else g selects differs from one of them only where f must have a
// wildcard.
func witnesses(f, g string) (out []string) {
	unknown := "w"
	for strings.Contains(f, unknown) {
		unknown += "w"
	}
	levels := strings.Split(g, "/")
	open := levels[len(levels)-1] == "#"
	if open {
		levels = levels[:len(levels)-1]
	}
	levels = slices.Clone(levels)
	for i, l := range levels {
		if l == "+" {
			levels[i] = unknown
		}
	}
	if !open {
		return []string{strings.Join(levels, "/")}
	}
	for range strings.Count(f, "/") + 3 {
		if len(levels) > 0 && strings.Join(levels, "/") != "" {
			out = append(out, strings.Join(levels, "/"))
		}
		levels = append(levels, unknown)
	}
	return out
}

// FuzzMatch checks that what is said to be covered is; this, that what is
// covered is said to be.
func FuzzFilterCovers(f *testing.F) {
	for _, a := range fuzzFilters {
		for _, b := range fuzzFilters {
			f.Add(a, b, "a/b")
		}
	}
	f.Fuzz(func(t *testing.T, a, b, name string) {
		if !validFilter(a) || !validFilter(b) {
			return
		}
		covers := topic.Filter(a).Covers(topic.Filter(b))
		want := true
		for _, w := range witnesses(a, b) {
			if !matches(b, w) {
				t.Fatalf("the test is wrong: %q does not select %q", b, w)
			}
			if !matches(a, w) {
				want = false
				if covers {
					t.Errorf("%q is said to cover %q, which selects %q", a, b, w)
				}
			}
		}
		// The parent of /# has an empty name, which no topic has: that /+/# covers
		// it as well is not worth a rule.
		if want && !covers && b != "/#" {
			t.Errorf("%q is said not to cover %q", a, b)
		}
		if covers && name != "" && !strings.ContainsAny(name, "+#") && matches(b, name) && !matches(a, name) {
			t.Errorf("%q is said to cover %q, which selects %q", a, b, name)
		}
	})
}
