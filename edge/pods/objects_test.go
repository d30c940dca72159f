package pods_test

import (
	"encoding/json"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/seal"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

// seal publishes something as only the node can read it.
func (s *site) seal(key *seal.Key, t topic.Topic, uid string, plain any) {
	s.t.Helper()
	b, err := json.Marshal(plain)
	if err != nil {
		s.t.Fatal(err)
	}
	s.rev++
	sealed, err := seal.Seal(key.Public(), t, uid, s.rev, b)
	if err != nil {
		s.t.Fatal(err)
	}
	s.publish(t, payload.Encode(sealed))
}

// TestSecrets: a pod waits for its Secret and its token, and its volumes follow them.
func TestSecrets(t *testing.T) {
	s := newSite(t)
	p := pod(t, manifest("vault", `echo "$PW $(cat /s/password) $(cat /t/token)"; until [ "$(cat /s/password)" = changed ]; do sleep 0.1; done; echo "$(cat /s/password) $(cat /t/token)"; `+forever, `
env: [{name: PW, valueFrom: {secretKeyRef: {name: sec, key: password}}}]
volumeMounts: [{name: s, mountPath: /s}, {name: t, mountPath: /t}]`, `
volumes:
- {name: s, secret: {secretName: sec}}
- {name: t, projected: {sources: [{serviceAccountToken: {path: token, expirationSeconds: 3607}}]}}`))
	s.apply(p)
	sec, tok := topic.DesiredSecret(node, "default", "sec"), topic.DesiredToken(node, "default", "vault")
	other, err := seal.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	password := func(v string) payload.SecretData {
		return payload.SecretData{Type: "Opaque", Data: map[string][]byte{"password": []byte(v)}}
	}
	token := func(v string) payload.PodTokens {
		return payload.PodTokens{Tokens: []payload.PodToken{{Seconds: 3607, Token: v, Exp: time.Now().Add(time.Hour).UnixMilli()}}}
	}
	s.seal(other, sec, "u1", password("wrong"))
	s.eventually("told that it cannot be opened", func() bool { return s.heard("FailedMount", "sealed to another key") })
	s.seal(s.key, sec, "u1", password("hunter2"))
	s.seal(s.key, tok, "another pod", token("of another pod"))
	s.eventually("told that the token is missing", func() bool { return s.heard("FailedMount", "service account token") })
	s.seal(s.key, tok, string(p.UID), token("token1"))
	s.until(p, "running", running)
	s.eventually("first words", func() bool { return s.log(p, "main", 0) == "hunter2 hunter2 token1" })
	s.seal(s.key, tok, string(p.UID), token("token2"))
	s.seal(s.key, sec, "u1", password("changed"))
	s.eventually("the changed ones", func() bool { return s.log(p, "main", 0) == "hunter2 hunter2 token1\nchanged token2" })
	if _, st, _ := s.report(p); st.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("restarted: %+v", st.ContainerStatuses[0])
	}
}

// TestUnsettled: while the bus may not have all that is wanted, nothing is ended for
// not being in it.
func TestUnsettled(t *testing.T) {
	s := newSite(t)
	p := pod(t, manifest("keep", forever, "", ""))
	s.apply(p)
	before := s.until(p, "running", running)
	s.stop()
	s.withdraw(p) // as if the store were lost
	s.settled.Store(false)
	s.start()
	marker := pod(t, manifest("marker", forever, "", ""))
	s.apply(marker)
	s.until(marker, "running", running)
	s.apply(p) // the cloud sends it again
	if after := s.until(p, "running", running); ids(&before) != ids(&after) {
		t.Errorf("it was ended and begun again:\n%+v\n%+v", before, after)
	}
	s.withdraw(p)
	s.eventually("ended, wished so", func() bool { _, _, ok := s.report(p); return !ok })
}

// TestManyAtOnce: fifty pods at once.
func TestManyAtOnce(t *testing.T) {
	if testing.Short() {
		t.Skip("SKIP: fifty pods take half a minute")
	}
	s := newSite(t)
	var all []*corev1.Pod
	for i := range 50 {
		name := string(rune('a'+i/26)) + string(rune('a'+i%26)) + "-many"
		p := pod(t, manifest(name, forever, "", ""))
		s.apply(p)
		all = append(all, p)
	}
	for _, p := range all {
		s.until(p, "running", running)
	}
	for _, p := range all {
		s.withdraw(p)
	}
	c := s.runtime()
	s.eventually("all gone", func() bool { return s.sandboxes(c) == 0 })
	for _, p := range all {
		s.eventually(p.Name+" retracted", func() bool { _, _, ok := s.report(p); return !ok })
	}
}
