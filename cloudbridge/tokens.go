package cloudbridge

import (
	"cmp"
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/fairlead-io/fairlead/schemas/payload"
	"github.com/fairlead-io/fairlead/schemas/seal"
	"github.com/fairlead-io/fairlead/schemas/topic"
)

const (
	// usualTokenSeconds is the API server's default of an expirationSeconds that is absent.
	usualTokenSeconds = 3600
	// longestTokenUse is how long a token is used at most, as by the kubelet.
	longestTokenUse = 24 * time.Hour
)

// tokenAsk is one token that a pod's volumes want.
type tokenAsk struct {
	audience string
	seconds  int64
}

// tokensOf lists the service account tokens that a pod's volumes want.
func tokensOf(p *corev1.Pod) []tokenAsk {
	var out []tokenAsk
	for _, v := range p.Spec.Volumes {
		if v.Projected == nil {
			continue
		}
		for _, s := range v.Projected.Sources {
			t := s.ServiceAccountToken
			if t == nil {
				continue
			}
			ask := tokenAsk{t.Audience, usualTokenSeconds}
			if t.ExpirationSeconds != nil {
				ask.seconds = *t.ExpirationSeconds
			}
			if !slices.Contains(out, ask) {
				out = append(out, ask)
			}
		}
	}
	slices.SortFunc(out, func(a, b tokenAsk) int {
		return cmp.Or(cmp.Compare(a.audience, b.audience), cmp.Compare(a.seconds, b.seconds))
	})
	return out
}

// holdToken takes over what there is of a pod's tokens. It gives the pod and what
// it asks for where tokens have to be issued, else nil.
func (d *desired) holdToken(ctx context.Context, name string) (p *corev1.Pod, asks []tokenAsk, to sealTo, err error) {
	owner := key{kindToken, name}
	p, ok := get[corev1.Pod](d.in.pods, name)
	if ok = ok && d.in.isEdge(p.Spec.NodeName); ok {
		was := p
		if p, err = d.whole(ctx, p); err != nil {
			d.keep(owner, topic.DesiredToken(was.Spec.NodeName, was.Namespace, was.Name))
			return nil, nil, to, err
		}
	}
	if ok && p != nil && !isMirrorPod(p) {
		asks = tokensOf(p)
	}
	if len(asks) == 0 {
		d.set(owner, nil)
		return nil, nil, to, nil
	}
	node := p.Spec.NodeName
	tp := topic.DesiredToken(node, p.Namespace, p.Name)
	prev, held := d.truth.before(tp)
	var s payload.Sealed
	held = held && payload.Decode(prev, &s) == nil && s.UID == string(p.UID)
	if held {
		d.set(owner, map[topic.Topic][]byte{tp: prev})
	} else {
		d.set(owner, map[topic.Topic][]byte{})
	}
	to = d.sealKey(node)
	switch {
	case to.id == "" || p.DeletionTimestamp != nil || terminal(p.Status.Phase):
		return nil, nil, to, nil // nobody could use another one
	case held && s.Key == to.id:
		if wait := time.UnixMilli(s.Renew).Sub(d.now()); wait > 0 {
			d.pods.AddAfter(owner, wait)
			return nil, nil, to, nil
		}
	}
	return p, asks, to, nil
}

// token issues a pod's service account tokens, sealed to its node, where there
// are none or those there are have to be renewed. It waits for a node that is
// away: the tokens would be old when it is back.
func (d *desired) token(ctx context.Context, name string) error {
	p, asks, to, err := d.holdToken(ctx, name)
	if err != nil || p == nil || !d.linkUp(p.Spec.NodeName) {
		return err // the link's return asks again
	}
	var plain payload.PodTokens
	var expires, renew time.Time
	for _, ask := range asks {
		began := d.now()
		tr := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
			ExpirationSeconds: &ask.seconds,
			BoundObjectRef:    &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: p.Name, UID: p.UID},
		}}
		if ask.audience != "" {
			tr.Spec.Audiences = []string{ask.audience}
		}
		account := cmp.Or(p.Spec.ServiceAccountName, "default")
		got, err := d.kube.CoreV1().ServiceAccounts(p.Namespace).CreateToken(ctx, account, tr, metav1.CreateOptions{})
		if d.count("token", err) != nil {
			return fmt.Errorf("token of service account %s/%s for pod %s: %w", p.Namespace, account, p.Name, err)
		}
		exp := got.Status.ExpirationTimestamp.Time
		plain.Tokens = append(plain.Tokens, payload.PodToken{
			Audience: ask.audience, Seconds: ask.seconds, Token: got.Status.Token, Exp: payload.Millis(exp),
		})
		if at := renewal(began, exp, rand.Float64()); renew.IsZero() || at.Before(renew) {
			renew = at
		}
		if expires.IsZero() || exp.Before(expires) {
			expires = exp
		}
	}
	node := p.Spec.NodeName
	tp := topic.DesiredToken(node, p.Namespace, p.Name)
	var was payload.Sealed
	if prev, ok := d.truth.before(tp); ok {
		_ = payload.Decode(prev, &was) // what cannot be read has no rev
	}
	s, err := seal.Seal(to.public, tp, string(p.UID), payload.NextRev(was.Rev, d.now()), payload.Encode(plain))
	if err != nil {
		return err
	}
	s.Exp, s.Renew = payload.Millis(expires), payload.Millis(renew)
	owner := key{kindToken, name}
	d.set(owner, map[topic.Topic][]byte{tp: payload.Encode(s)})
	d.pods.AddAfter(owner, renew.Sub(d.now()))
	return nil
}

// renewal is when a token is issued anew: at 80 % of its life, after a day at the
// latest. Up to a tenth of that is taken off, by luck, so that a cluster that came
// up at once does not ask for all its tokens at once ever after.
func renewal(issued, expires time.Time, luck float64) time.Time {
	use := min(expires.Sub(issued)*8/10, longestTokenUse)
	return issued.Add(use - time.Duration(luck*float64(use/10)))
}

// renewTokens looks again at the tokens of a node's pods, all nodes' where it is
// empty, as after a link's return.
func (d *desired) renewTokens(node string) {
	pods := d.in.pods.GetIndexer().ListKeys()
	if node != "" {
		pods = indexed(d.in.pods, byNode, node)
	}
	for _, pod := range pods {
		if p, ok := get[corev1.Pod](d.in.pods, pod); ok && d.in.isEdge(p.Spec.NodeName) {
			d.pods.Add(key{kindToken, pod})
		}
	}
}
