package token

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
)

// Why a login is refused. The text reaches the client as its reason string; it
// does not tell whether the node exists.
var (
	ErrNoCredentials = errors.New("this listener wants credentials: user name the node, password its token; `fairlead token create --node NODE` makes one")
	ErrWrongToken    = errors.New("node or token is not known here; `fairlead token create --node NODE` makes a new token")
)

// Checker checks tokens against the Secrets, which it watches. Its methods may
// be called from any goroutine.
type Checker struct {
	informer cache.SharedIndexInformer
	log      *slog.Logger
	handlers cache.ResourceEventHandlerRegistration

	mu struct {
		sync.RWMutex
		hashes map[string][sha256.Size]byte // by node
	}
}

// NewChecker makes a checker of the namespace's tokens.
func NewChecker(kube kubernetes.Interface, namespace string, log *slog.Logger) (*Checker, error) {
	if namespace == "" {
		namespace = DefaultNamespace
	}
	c := &Checker{log: log}
	if c.log == nil {
		c.log = slog.New(slog.DiscardHandler)
	}
	c.mu.hashes = map[string][sha256.Size]byte{}
	client := kube.CoreV1().RESTClient()
	lw := cache.NewFilteredListWatchFromClient(client, "secrets", namespace, func(o *metav1.ListOptions) {
		o.LabelSelector = NodeLabel
		o.FieldSelector = fields.OneTermEqualSelector("type", string(SecretType)).String()
	})
	c.informer = cache.NewSharedIndexInformerWithOptions(cache.ToListWatcherWithWatchListSemantics(lw, kube), &corev1.Secret{}, cache.SharedIndexInformerOptions{})
	if err := c.informer.SetTransform(trim); err != nil {
		return nil, fmt.Errorf("watch tokens: %w", err)
	}
	h, err := c.informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { c.put(o) },
		UpdateFunc: func(_, o any) { c.put(o) },
		DeleteFunc: func(o any) { c.remove(o) },
	})
	if err != nil {
		return nil, fmt.Errorf("watch tokens: %w", err)
	}
	c.handlers = h
	return c, nil
}

// trim keeps of a Secret what [read] needs.
func trim(o any) (any, error) {
	if s, ok := o.(*corev1.Secret); ok {
		s.ManagedFields, s.Annotations = nil, nil
	}
	return o, nil
}

func (c *Checker) put(o any) {
	s, ok := o.(*corev1.Secret)
	if !ok {
		return
	}
	node, hash, err := read(s)
	if err != nil {
		c.log.Error("a node token cannot be used, make a new one", "error", err)
		c.remove(o)
		return
	}
	c.mu.Lock()
	c.mu.hashes[node] = hash
	c.mu.Unlock()
}

func (c *Checker) remove(o any) {
	if d, ok := o.(cache.DeletedFinalStateUnknown); ok {
		o = d.Obj
	}
	s, ok := o.(*corev1.Secret)
	if !ok {
		return
	}
	node, ok := strings.CutPrefix(s.Name, namePrefix) // not the label: it may be what is wrong
	if !ok {
		return
	}
	c.mu.Lock()
	delete(c.mu.hashes, node)
	c.mu.Unlock()
}

// Run watches until ctx ends.
func (c *Checker) Run(ctx context.Context) { c.informer.RunWithContext(ctx) }

// Synced tells whether every token that there is has been seen.
func (c *Checker) Synced() bool { return c.handlers.HasSynced() }

// WaitSynced waits for Synced; false means that ctx ended first.
func (c *Checker) WaitSynced(ctx context.Context) bool {
	return cache.WaitForCacheSync(ctx.Done(), c.handlers.HasSynced)
}

// Check tells whether the token is the node's: nil, [ErrNoCredentials] or
// [ErrWrongToken]. It takes the same time for every wrong token.
func (c *Checker) Check(node, token string) error {
	if node == "" || token == "" {
		return ErrNoCredentials
	}
	got := sha256.Sum256([]byte(token))
	c.mu.RLock()
	want, ok := c.mu.hashes[node]
	c.mu.RUnlock()
	// An unknown node is compared too, with zeros that nothing hashes to.
	if subtle.ConstantTimeCompare(got[:], want[:]) != 1 || !ok {
		return ErrWrongToken
	}
	return nil
}
