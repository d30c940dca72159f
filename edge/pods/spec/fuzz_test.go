package spec

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func kv(pairs ...string) []*runtimeapi.KeyValue {
	var out []*runtimeapi.KeyValue
	for i := 0; i < len(pairs); i += 2 {
		out = append(out, &runtimeapi.KeyValue{Key: pairs[i], Value: []byte(pairs[i+1])})
	}
	return out
}

func FuzzExpand(f *testing.F) {
	for _, s := range []string{"", "$", "$$", "$(A)", "$$(A)", "$$$(A)", "$(A", "$(", "$()", "$(MISSING)", "$(A)$(B)", "$A", "$é", "$\xff", "a$(A)b$", "$(A$(B))"} {
		f.Add(s)
	}
	env := kv("A", "$(B)", "B", "b", "", "nothing")
	f.Fuzz(func(t *testing.T, s string) {
		got := Expand(s, env)
		if !strings.Contains(s, "$") && got != s {
			t.Errorf("%q became %q", s, got)
		}
		if quoted := strings.ReplaceAll(s, "$", "$$"); Expand(quoted, env) != s {
			t.Errorf("%q, quoted, became %q", s, Expand(quoted, env))
		}
		// Values are not expanded again.
		if got := Expand("$(A)"+s, env); !strings.HasPrefix(got, "$(B)") {
			t.Errorf("%q", got)
		}
		// Without the unknown, every reference goes.
		if path, err := ExpandPath(s, env); err == nil && !strings.Contains(s, "$$") && path != got {
			t.Errorf("%q: as a path %q, else %q", s, path, got)
		}
	})
}

func FuzzEnvFile(f *testing.F) {
	f.Add("K", "v", "# c\nA='1' # x\n")
	f.Add("K", "two\nlines", "")
	f.Add("K", "", "K= 'x'\n")
	f.Fuzz(func(t *testing.T, key, value, before string) {
		if _, err := parseEnvFile(before, key); err != nil {
			return
		}
		if strings.ContainsAny(key, "=\n\r# \t") || key == "" || strings.ContainsAny(value, "'\r") || before != "" && !strings.HasSuffix(before, "\n") {
			return
		}
		got, err := parseEnvFile(before+key+"='"+value+"'\n", key)
		if err != nil {
			t.Fatal(err)
		}
		if first, _ := parseEnvFile(before, key); first == "" && got != value && !strings.Contains(before, key) {
			t.Errorf("%q is read as %q", value, got)
		}
	})
}

func FuzzResolvConf(f *testing.F) {
	f.Add(resolvConf)
	f.Add("nameserver\n")
	f.Add("search\noptions\n;x\n#y")
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseResolvConf(s)
		if err != nil {
			return
		}
		var text strings.Builder
		for _, n := range r.Nameservers {
			text.WriteString("nameserver " + n + "\n")
		}
		text.WriteString("search " + strings.Join(r.Searches, " ") + "\noptions " + strings.Join(r.Options, " "))
		again, err := ParseResolvConf(text.String())
		if err != nil {
			t.Fatal(err)
		}
		if len(again.Nameservers) != len(r.Nameservers) || len(again.Options) != len(r.Options) || len(again.Searches) > len(r.Searches) {
			t.Errorf("%+v read back as %+v", r, again)
		}
		p := pod("p", func(p *corev1.Pod, _ *corev1.Container) { p.Spec.DNSPolicy = corev1.DNSDefault })
		dns, _ := DNS(p, &Node{Resolv: r})
		if len(dns.Servers) > maxNameservers || len(dns.Searches) > maxSearches || len(strings.Join(dns.Searches, " ")) > maxSearchChars {
			t.Errorf("%v is more than a resolver takes", dns)
		}
	})
}

func FuzzFieldValue(f *testing.F) {
	f.Add("metadata.labels['a']")
	f.Add("metadata.labels['']")
	f.Add("['']")
	f.Add("metadata.name")
	f.Fuzz(func(t *testing.T, path string) {
		p := pod("p")
		v, err := FieldValue(p, path)
		if err != nil && v != "" {
			t.Errorf("%q with %v", v, err)
		}
		env, err2 := envField(&corev1.ObjectFieldSelector{FieldPath: path}, p, &Node{}, nil)
		if err == nil && (err2 != nil || env != v) {
			t.Errorf("%s is %q in a volume, %q (%v) in the environment", path, v, env, err2)
		}
	})
}
