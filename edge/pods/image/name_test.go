package image

import (
	"slices"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	const digest = "@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	for _, test := range []struct {
		image, tagged, repository, canonical string
		latest                               bool
	}{
		{"busybox", "busybox:latest", "docker.io/library/busybox", "docker.io/library/busybox:latest", true},
		{"busybox:1", "busybox:1", "docker.io/library/busybox", "docker.io/library/busybox:1", false},
		{"team/app", "team/app:latest", "docker.io/team/app", "docker.io/team/app:latest", true},
		{"index.docker.io/app:2", "index.docker.io/app:2", "docker.io/library/app", "docker.io/library/app:2", false},
		{"fairlead.test/app:latest", "fairlead.test/app:latest", "fairlead.test/app", "fairlead.test/app:latest", true},
		{"localhost/app", "localhost/app:latest", "localhost/app", "localhost/app:latest", true},
		{"fairlead.test:5000/a/b", "fairlead.test:5000/a/b:latest", "fairlead.test:5000/a/b", "fairlead.test:5000/a/b:latest", true},
		{"fairlead.test/app" + digest, "fairlead.test/app" + digest, "fairlead.test/app", "fairlead.test/app" + digest, false},
		{"fairlead.test/app:latest" + digest, "fairlead.test/app:latest" + digest, "fairlead.test/app", "fairlead.test/app" + digest, false},
	} {
		n, err := parse(test.image)
		if err != nil || n.tagged != test.tagged || n.repository != test.repository || n.latest != test.latest || !strings.HasPrefix(n.repository, n.registry+"/") {
			t.Errorf("%s: got %+v, %v", test.image, n, err)
		}
		if got := canonical(test.image); got != test.canonical {
			t.Errorf("%s: want %s, got %s", test.image, test.canonical, got)
		}
	}
	for _, id := range []string{"", digest[1:], "not a name"} {
		if got := canonical(id); got != id {
			t.Errorf("%s: got %s", id, got)
		}
	}
}

// TestLookup is about names of registries that a test cannot be.
func TestLookup(t *testing.T) {
	for _, test := range []struct {
		keys, repository, want string
	}{
		{"fairlead.test", "fairlead.test/app", "fairlead.test"},
		{"fairlead.test", "fairlead.test:5000/app", ""},
		{"fairlead.test:5000", "fairlead.test:5000/app", "fairlead.test:5000"},
		{"fairlead.test:5000", "fairlead.test:5001/app", ""},
		{"fairlead.test:5000", "fairlead.test/app", ""},
		{"[::1]:5000", "[::1]:5000/app", "[::1]:5000"},
		{"*.test", "fairlead.test/app", "*.test"},
		{"*.test", "a.fairlead.test/app", ""},
		{"*.*.test", "a.fairlead.test/app", "*.*.test"},
		{"fair*.test", "fairlead.test/app", "fair*.test"},
		{"[.test", "fairlead.test/app", ""},
		{"fairlead.test fairlead.test/a fairlead.test/a/b fairlead.test/c", "fairlead.test/a/b", "fairlead.test/a/b fairlead.test/a fairlead.test"},
		{"fairlead.test/ fairlead.test/v1/ https://fairlead.test/v2/x http://fairlead.test", "fairlead.test/x", "https://fairlead.test/v2/x fairlead.test/ fairlead.test/v1/ http://fairlead.test"},
		// The default registry has another name in Docker's configuration.
		{"https://index.docker.io/v1/", "docker.io/library/app", "https://index.docker.io/v1/"},
		{"https://index.docker.io/v1/ docker.io", "docker.io/library/app", "docker.io"},
		{"https://index.docker.io/v1/", "fairlead.test/app", ""},
		{"%zz fairlead.test", "fairlead.test/app", "fairlead.test"},
	} {
		k := keyring{}
		for _, key := range strings.Fields(test.keys) { // one by one, as they come in order from several secrets
			if err := k.add(map[string]dockerAuth{key: {Username: key}}, nil); err != nil {
				t.Fatal(err)
			}
		}
		var got []string
		for _, c := range k.lookup(test.repository) {
			got = append(got, c.username)
		}
		if !slices.Equal(got, strings.Fields(test.want)) {
			t.Errorf("%s for %s: want %s, got %q", test.keys, test.repository, test.want, got)
		}
	}
}

func TestPullError(t *testing.T) {
	for _, test := range []struct{ err, reason, message string }{
		{"RegistryUnavailable: pull: 503", RegistryUnavailable, "image pull failed for app because the registry is unavailable: pull: 503"},
		{"SignatureValidationFailed: no key", SignatureValidationFailed, "image pull failed for app because the signature validation failed: no key"},
		{"other: RegistryUnavailable", ErrImagePull, "other: RegistryUnavailable"},
	} {
		if got := pullError("app", text(test.err)); got.Reason != test.reason || got.Message != test.message {
			t.Errorf("%s: got %+v", test.err, got)
		}
	}
	for err, want := range map[text]bool{
		// containerd 1.6 and CRI-O; the first is seen in TestPull too.
		`failed to resolve reference "offline.test/app:1": failed to do request: Head "https://offline.test/v2/app/manifests/1": dial tcp: lookup offline.test: no such host`:   true,
		`initializing source docker://offline.test/app:1: pinging container registry offline.test: Get "https://offline.test/v2/": dial tcp: lookup offline.test: no such host`: true,
		"RegistryUnavailable: 503": true,
		`failed to resolve reference "fairlead.test/app:1": fairlead.test/app:1: not found`: false,
	} {
		if unreachable(err) != want {
			t.Errorf("%s: want %v", err, want)
		}
	}
}

type text string

func (t text) Error() string { return string(t) }
