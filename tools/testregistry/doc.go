// Package testregistry is an image registry for tests: the pulling half of the
// OCI distribution API on the loopback, with credentials, slowness and failures
// as a test wants them.
//
//	reg := testregistry.Start(t)
//	archive, err := testruntime.Image("fairlead.test/app:1", files, cfg)
//	digest, err := reg.Push(archive)               // fairlead.test/app:1, and @digest
//	err = rt.Registry("fairlead.test", reg.URL)    // where the runtime finds it
//	reg.Private("app", "user", "password")
//	reg.Before(func(w http.ResponseWriter, q testregistry.Request) bool { … wait, or answer … })
package testregistry
