// Package token makes, revokes and checks the credential with which an edge node
// logs in to the cloud broker: user name the node, password the token.
//
//	store := token.Store{Kube: kube}
//	secret, err := store.Create(ctx, "plant-7") // shown once, never stored
//	err = store.Revoke(ctx, "plant-7")
//
//	check := token.NewChecker(kube, "fairlead-system", logger)
//	go check.Run(ctx)
//	err = check.Check("plant-7", password)
//
// A token is 32 random bytes. Kubernetes holds the SHA-256 of its text in the
// Secret fairlead-node-<node>; a hash without salt is enough for 256 random bits.
package token
