package spec

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Expand replaces $(NAME) in s by the variables of env. $$ stands for one $, and
// references to names that env has not stay as they are.
func Expand(s string, env []*runtimeapi.KeyValue) string {
	return expand(s, func(name string) string {
		if v, ok := lookup(env, name); ok {
			return v
		}
		return "$(" + name + ")"
	})
}

// ExpandPath is Expand for subPathExpr: names that env has not, or that are empty
// there, are an error.
func ExpandPath(s string, env []*runtimeapi.KeyValue) (string, error) {
	var missing []string
	path := expand(s, func(name string) string {
		v, _ := lookup(env, name)
		if v == "" {
			missing = append(missing, name)
		}
		return v
	})
	if len(missing) > 0 {
		slices.Sort(missing)
		return "", fmt.Errorf("missing value for %s", strings.Join(slices.Compact(missing), ", "))
	}
	return path, nil
}

func lookup(env []*runtimeapi.KeyValue, name string) (string, bool) {
	for _, kv := range env {
		if kv.Key == name {
			return string(kv.Value), true
		}
	}
	return "", false
}

func expand(s string, value func(name string) string) string {
	if !strings.Contains(s, "$") {
		return s
	}
	var out strings.Builder
	for {
		text, rest, found := strings.Cut(s, "$")
		out.WriteString(text)
		switch {
		case !found:
			return out.String()
		case rest == "":
			out.WriteByte('$')
			return out.String()
		case rest[0] == '$':
			out.WriteByte('$')
			s = rest[1:]
		case rest[0] == '(':
			name, after, closed := strings.Cut(rest[1:], ")")
			if !closed {
				out.WriteString("$(")
				s = rest[1:]
				continue
			}
			out.WriteString(value(name))
			s = after
		default:
			// The rune after a lone $ goes with it: one that is no UTF-8 comes out as
			// U+FFFD, as under the kubelet.
			r, size := utf8.DecodeRuneInString(rest)
			out.WriteByte('$')
			out.WriteRune(r)
			s = rest[size:]
		}
	}
}

// command expands the container's command or its arguments.
func command(words []string, env []*runtimeapi.KeyValue) []string {
	if len(words) == 0 {
		return nil
	}
	out := make([]string, len(words))
	for i, w := range words {
		out[i] = Expand(w, env)
	}
	return out
}
