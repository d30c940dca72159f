package token

import (
	"crypto/sha256"
	"errors"
	"log/slog"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/cache"
)

func TestFresh(t *testing.T) {
	text, s, err := Store{}.fresh("plant-7")
	if err != nil {
		t.Fatal(err)
	}
	if len(text) != 43 || s.Name != "fairlead-node-plant-7" || s.Namespace != DefaultNamespace || s.Type != SecretType || s.Labels[NodeLabel] != "plant-7" {
		t.Errorf("%d characters, %+v", len(text), s)
	}
	node, hash, err := read(s)
	if err != nil || node != "plant-7" || hash != sha256.Sum256([]byte(text)) {
		t.Errorf("read back: %s, %v", node, err)
	}
	other, _, err := Store{}.fresh("plant-7")
	if err != nil || other == text {
		t.Errorf("the same token twice, %v", err)
	}
	for _, bad := range []string{"", "Plant", "a/b", "a+b", strings.Repeat("a", 64)} {
		if _, _, err := (Store{}).fresh(bad); err == nil {
			t.Errorf("a token for node %q", bad)
		}
	}
}

func TestChecker(t *testing.T) {
	c := &Checker{log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	c.mu.hashes = map[string][sha256.Size]byte{}
	text, s, err := Store{}.fresh("plant-7")
	if err != nil {
		t.Fatal(err)
	}
	c.put(s)
	for _, tc := range []struct {
		node, token string
		want        error
	}{
		{"plant-7", text, nil},
		{"plant-7", text + "A", ErrWrongToken},
		{"plant-8", text, ErrWrongToken},
		{"plant-7", "", ErrNoCredentials},
		{"", text, ErrNoCredentials},
		{"plant-7", string(s.Data[hashKey]), ErrWrongToken},
	} {
		if err := c.Check(tc.node, tc.token); !errors.Is(err, tc.want) {
			t.Errorf("Check(%q, …): %v, want %v", tc.node, err, tc.want)
		}
	}
	// A Secret that lies about its node touches nobody else's token.
	c.put(&corev1.Secret{Type: SecretType, ObjectMeta: s.ObjectMeta, Data: map[string][]byte{hashKey: []byte("short")}})
	if err := c.Check("plant-7", text); !errors.Is(err, ErrWrongToken) {
		t.Errorf("a broken Secret lets in: %v", err)
	}
	c.put(s)
	foreign := s.DeepCopy()
	foreign.Name = "something"
	c.put(foreign)
	c.remove(foreign)
	if err := c.Check("plant-7", text); err != nil {
		t.Errorf("a foreign Secret revoked the token: %v", err)
	}
	c.remove(cache.DeletedFinalStateUnknown{Key: "x", Obj: s})
	if err := c.Check("plant-7", text); !errors.Is(err, ErrWrongToken) {
		t.Errorf("a revoked token lets in: %v", err)
	}
}
